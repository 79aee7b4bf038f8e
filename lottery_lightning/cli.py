"""usage: python train.py [COMMAND] --config FILE [--key value ...].

commands:
  lottery                      winning tickets by iterative magnitude pruning, and their controls
  subset-sum                   how often random samples have a subset near a target, beside the theorems' sizes
  subset-sum-network           a trained network whose weights are sums of random samples
  strong-ticket                random networks pruned, never trained, into the approximation of a trained one
  edge-popup                   random networks whose masks are searched by gradient, and whose weights never change
  instability                  whether copies that differ in the noise of SGD alone end in one valley
  distilled-pruning            tickets found on distilled data beside those of real data, on real data
  geometry                     curvature and loss landscapes of the tickets of a finished lottery
  heavy-tails                  networks trained with alpha-stable noise, and how far they can be compressed
  distill                      a few images to train on, made of a data set, beside as many real ones
  fit, validate, test, predict one run under LightningCLI

Without any argument: the lottery of configs/quickstart.yaml. A config whose top key names the command needs no
COMMAND. Options of a command: python train.py COMMAND --help; its complete config: ... --print_config.
Errors are one line; LOTTERY_DEBUG=1 shows where they come from.
"""

import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

# Bare class names in configs resolve to what is imported here.
import lottery_callbacks  # noqa: F401
import lottery_lightning.networks  # noqa: F401
from lottery_lightning import __version__
from lottery_lightning.data import TensorDataModule  # noqa: F401
from lottery_lightning.experiments import (
    Distill,
    DistilledPruning,
    EdgePopupSearch,
    Geometry,
    HeavyTails,
    Instability,
    Lottery,
    StrongTickets,
    SubsetSum,
    SubsetSumNetwork,
)
from lottery_lightning.experiments.store import claim
from lottery_lightning.tasks import ImageClassifier  # noqa: F401

EXPERIMENTS = {
    "lottery": Lottery,
    "subset-sum": SubsetSum,
    "subset-sum-network": SubsetSumNetwork,
    "strong-ticket": StrongTickets,
    "edge-popup": EdgePopupSearch,
    "instability": Instability,
    "distilled-pruning": DistilledPruning,
    "geometry": Geometry,
    "heavy-tails": HeavyTails,
    "distill": Distill,
}
LIGHTNING = ("fit", "validate", "test", "predict")
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what a user can mend is one line on stderr and code 1."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--config", str(QUICKSTART)]
    arguments = [word for given in arguments for word in _apart(given)]
    if arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if arguments[0] == "--version":
        print(f"lottery-lightning {__version__}")
        return 0
    command = arguments[0]
    try:
        command = _command(arguments)
        options = arguments[arguments[0] == command :]
        if command in EXPERIMENTS:
            return _experiment(command, options)
        _lightning([command, *_unwrap(options, command)])
    except ArgumentError as error:
        return _fail(f"{error}; see train.py {command} --help")
    except (ValueError, OSError, RuntimeError, MisconfigurationException) as error:
        if os.environ.get("LOTTERY_DEBUG"):
            raise
        return _fail(str(error))
    return 0


def _apart(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--config=") else [word]


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _command(arguments: Sequence[str]) -> str:
    known = (*EXPERIMENTS, *LIGHTNING)
    command = arguments[0]
    if command == "--config" and len(arguments) > 1:
        command = next(iter(_read(arguments[1])), "")
        if command not in known:
            raise ValueError(f"the top key of {arguments[1]} is {command!r} and no command: {', '.join(known)}")
    if command not in known:
        raise ValueError(f"{command!r} is no command: choose {', '.join(known)}")
    return command


def _unwrap(arguments: Sequence[str], command: str) -> list[str]:
    """Options with each config that has the command as its only top key replaced by what is below it.

    A config of `fit` serves `validate`, `test` and `predict` too.
    """
    options = list(arguments)
    same = LIGHTNING if command in LIGHTNING else (command,)
    for position, word in enumerate(options[1:], start=1):
        if options[position - 1] == "--config" and len(content := _read(word)) == 1 and next(iter(content)) in same:
            options[position] = yaml.safe_dump(next(iter(content.values())), sort_keys=False)
    return options


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"config {path} does not exist: give the path of a YAML file")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path} holds no keys: its top key names the command")
    return content


def build(name: str, options: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The experiment that the options of its command describe, and its complete config in primitives."""
    parser = ArgumentParser(prog=f"train.py {name}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file; later options override it")
    parser.add_class_arguments(EXPERIMENTS[name])
    config = parser.parse_args(_unwrap(options, name))
    identity = yaml.safe_load(parser.dump(config))
    L.seed_everything(config.seed, verbose=False)  # for what `reset_parameters` leaves: frozen weights, buffers
    arguments = {key: value for key, value in vars(parser.instantiate(config)).items() if key != "config"}
    return EXPERIMENTS[name](**arguments), {name: {key: value for key, value in identity.items() if key != "config"}}


def _experiment(name: str, options: Sequence[str]) -> int:
    quiet()
    experiment, config = build(name, options)  # checks its arguments before the folder is claimed
    claim(experiment.run_dir, config)
    try:
        experiment.run()
    except (KeyboardInterrupt, SystemExit):  # Lightning turns an interrupted fit into an exit
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


class SaveFitConfig(SaveConfigCallback):
    """Keeps the complete config of a fit beside its logs; evaluations leave nothing behind."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


def _lightning(arguments: list[str]) -> None:
    one_line: dict[str, Any] = {"exit_on_error": False}
    warnings.filterwarnings("ignore", r"LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", r"(?s).*was deprecated in v4.*removed in v5.*")  # Lightning's use of jsonargparse
    LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs=one_line | dict.fromkeys(LIGHTNING, one_line),
        args=arguments,
    )


def quiet() -> None:
    """Leave the terminal to the experiment's own lines: silence Lightning's notes on each of its many fits."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r"Checkpoint directory .* exists and is not empty.*",
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*in eval mode at the start of training.*",
        r"GPU available but not used.*",
    ):
        warnings.filterwarnings("ignore", message)


if __name__ == "__main__":
    sys.exit(main())
