"""The command line: `python train.py COMMAND --config FILE [--key value ...]`.

An experiment's name runs that experiment; fit, validate, test and predict are LightningCLI.
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI

# Bare class names in configs resolve to what is imported here.
import lottery_callbacks  # noqa: F401
import lottery_lightning.networks  # noqa: F401
from lottery_lightning import __version__
from lottery_lightning.data import TensorDataModule  # noqa: F401
from lottery_lightning.experiments import Lottery
from lottery_lightning.experiments.store import claim
from lottery_lightning.tasks import ImageClassifier  # noqa: F401

EXPERIMENTS = {"lottery": Lottery}
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
LIGHTNING = ("fit", "validate", "test", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; no arguments run the quickstart.

    Errors that a user can mend are one line on stderr and exit code 1; wrong arguments are exit code 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["lottery", "--config", str(QUICKSTART)]
    command = next((a for a in arguments if a in EXPERIMENTS or a in LIGHTNING), None)
    try:
        if command in EXPERIMENTS or command is None:
            return _experiment(_lift_configs(arguments, command))
        LightningCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"version": __version__},
            args=_lift_configs(arguments, command),
        )
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _experiment(arguments: list[str]) -> int:
    parser = ArgumentParser(prog="train.py", description=__doc__, version=__version__)
    parser.add_argument("--config", action="config", help="a YAML whose top key names the command")
    commands = parser.add_subcommands(dest="command")
    for name, experiment in EXPERIMENTS.items():
        sub = ArgumentParser()
        sub.add_argument("--config", action="config", help="a YAML of the experiment, with or without its top key")
        sub.add_class_arguments(experiment)
        commands.add_subcommand(name, sub)
    config = parser.parse_args(arguments)
    name = config.command
    quiet()
    claim(Path(config[name].run_dir), _identity(parser, config, name))
    EXPERIMENTS[name](**_instances(parser, config, name)).run()
    return 0


def _identity(parser: ArgumentParser, config: Any, name: str) -> dict[str, Any]:
    chosen = yaml.safe_load(parser.dump(config))[name]
    return {name: {key: value for key, value in chosen.items() if key != "config"}}


def _instances(parser: ArgumentParser, config: Any, name: str) -> dict[str, Any]:
    instantiated = parser.instantiate(config)[name]
    return {key: value for key, value in vars(instantiated).items() if key != "config"}


def _lift_configs(arguments: list[str], command: str | None) -> list[str]:
    """Move configs whose top key is the command in front of it, where the parser expects such."""
    lifted, rest, position = [], [], 0
    while position < len(arguments):
        word = arguments[position]
        path = arguments[position + 1] if word == "--config" and position + 1 < len(arguments) else None
        path = word.removeprefix("--config=") if word.startswith("--config=") else path
        taken = 2 if word == "--config" and path is not None else 1
        (lifted if path is not None and _top_key(path) == command else rest).extend(arguments[position : position + taken])
        position += taken
    return lifted + rest


def _top_key(path: str) -> str | None:
    """The only top key of a YAML file, if it has one such."""
    if not Path(path).is_file():
        raise ValueError(f"config {path} does not exist: give the path of a YAML file")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} is no YAML: {error}") from error
    return next(iter(content)) if isinstance(content, dict) and len(content) == 1 else None


def quiet() -> None:
    """Leave the terminal to the experiment's own lines: silence Lightning's notes on each of its many fits."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",
        r"Checkpoint directory .* exists and is not empty.*",
        r".*litlogger.*",
        r"GPU available but not used.*",
    ):
        warnings.filterwarnings("ignore", message)


if __name__ == "__main__":
    sys.exit(main())
