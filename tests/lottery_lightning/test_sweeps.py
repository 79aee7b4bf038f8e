"""Sweeps: what a W&B agent makes of each file, the same in plain bash, and one of the experiments."""

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lottery_lightning.cli import main

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
TINY = [
    *("--levels", "1", "--controls", "{}", "--training.max_steps", "4", "--training.val_every", "2it"),
    *("--data", "Digits", "--model.init_args.network.init_args.widths", "[64, 20, 10]", "--training.logger", "none"),
]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Runs a shell command in a folder where `python` only tells its arguments; gives those of each call."""
    shim = tmp_path / "bin" / "python"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" END\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:/usr/bin:/bin")

    def run(command: list[str]) -> list[list[str]]:
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        return [call.split("\n")[:-1] for call in told.split("END\n")[:-1]]

    return run


def combinations(sweep):
    """The grid: a value of every parameter."""
    values = [parameter["values"] for parameter in sweep["parameters"].values()]
    return [dict(zip(sweep["parameters"], chosen, strict=True)) for chosen in itertools.product(*values)]


def agent_command(sweep, chosen):
    """The command of one run, as W&B's agent makes it: whole words that are macros are replaced, others are kept."""
    macros = {"${env}": ["/usr/bin/env"], "${interpreter}": ["python"], "${program}": [sweep["program"]]}
    macros["${args}"] = [f"--{name}={value}" for name, value in chosen.items()]
    return [word for given in sweep["command"] for word in macros.get(given, [given])]


def loop_of(path):
    """The bash loop in the comment."""
    comment = re.search(r"in bash:\n#\n((?:#   .*\n)+)", path.read_text())
    assert comment
    return comment[1].replace("#   ", "")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_each_run_of_a_sweep_has_a_run_dir_of_its_own_and_the_bash_loop_makes_the_same_runs(path, calls):
    sweep = yaml.safe_load(path.read_text())
    grid = combinations(sweep)
    (told,) = zip(*(calls(agent_command(sweep, chosen)) for chosen in grid), strict=True)
    run_dirs = [arguments[arguments.index("--run_dir") + 1] for arguments in told]
    assert len(set(run_dirs)) == len(grid) == 15
    for chosen, arguments, run_dir in zip(grid, told, run_dirs, strict=True):
        assert arguments[:2] == ["train.py", "lottery"]
        for name, value in chosen.items():
            assert f"--{name}={value}" in arguments
            assert f"{name}={value}" in run_dir
    plain = calls(["bash", "-c", loop_of(path)])
    logged = [[word for word in arguments if word not in ("--training.logger", "wandb")] for arguments in told]
    assert sorted(plain) == sorted(logged)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_run_of_a_sweep_runs_and_each_parameter_is_the_option_of_its_name(path, calls, tmp_path, monkeypatch):
    sweep = yaml.safe_load(path.read_text())
    chosen = combinations(sweep)[-1]
    ((_, *arguments),) = calls(agent_command(sweep, chosen))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, *TINY]) == 0
    run_dir = Path(arguments[arguments.index("--run_dir") + 1])
    assert len((run_dir / "results.csv").read_text().splitlines()) == 3
    config = yaml.safe_load((run_dir / "config.yaml").read_text())["lottery"]
    for name, value in chosen.items():
        *above, last = name.split(".")
        section = config
        for key in above:
            section = section[key]
        assert section[last] == value


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_wandb_itself_makes_the_same_arguments_of_a_combination(path):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load(path.read_text())
    chosen = combinations(sweep)[0]
    arguments = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    assert agent_command(sweep, chosen)[-len(chosen) :] == arguments["args"]
    assert utils.create_sweep_command(sweep["command"]) == sweep["command"]
