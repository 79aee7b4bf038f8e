"""Options of scores from YAML and the command line: parsed, printed, given back, and part of the tickets."""

from pathlib import Path

import pytest
import yaml

from lottery_callbacks import Ticket
from lottery_lightning.cli import main

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
PRUNING = {"score": "grasp", "scope": "global", "counts": "truncated"}


def config(tmp_path, **pruning):
    whole = yaml.safe_load(QUICKSTART.read_text())
    whole["lottery"] |= {"run_dir": str(tmp_path / "run"), "levels": 1, "controls": {}}
    whole["lottery"]["training"]["max_steps"] = 20
    whole["lottery"]["rule"]["pruning"] = PRUNING | pruning
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(whole))
    return ["lottery", "--config", str(path)]


def printed(capsys, command):
    with pytest.raises(SystemExit):
        main([*command, "--print_config"])
    return capsys.readouterr().out


def test_options_are_printed_and_can_be_given_back(tmp_path, capsys):
    first = printed(capsys, config(tmp_path, score_options={"temperature": 200, "mode": "evaluation"}))
    pruning = yaml.safe_load(first)["rule"]["pruning"]["init_args"]
    assert pruning["score_options"] == {"temperature": 200.0, "mode": "evaluation"}
    assert pruning["counts"] == "truncated"
    path = tmp_path / "complete.yaml"
    path.write_text(first)
    assert yaml.safe_load(printed(capsys, ["lottery", "--config", str(path)])) == yaml.safe_load(first)
    line = ["--rule.pruning.score_options", "{temperature: 7}", "--rule.pruning.counts", "ceiling"]
    pruning = yaml.safe_load(printed(capsys, [*config(tmp_path), *line]))["rule"]["pruning"]["init_args"]
    assert (pruning["score_options"], pruning["counts"]) == ({"temperature": 7.0}, "ceiling")
    plain = yaml.safe_load(printed(capsys, config(tmp_path, counts=None)))["rule"]["pruning"]["init_args"]
    assert (plain["score_options"], plain["counts"]) == (None, None)  # as in folders that were begun before


def test_an_experiment_runs_by_them_and_its_tickets_say_so(tmp_path, capsys):
    command = config(tmp_path, score_options={"temperature": 200, "mode": "evaluation"})
    assert main(command) == 0
    (path,) = tmp_path.rglob("tickets/level_01.safetensors")
    ticket = Ticket.load(path)
    assert ticket.provenance["pruning"] == "grasp(mode=evaluation, temperature=200.0), global, truncated"
    total = 64 * 300 + 300 * 100 + 100 * 10
    assert sum(int(mask.sum()) for mask in ticket.masks.values()) == total - int(0.2 * total)
    capsys.readouterr()
    assert main([*config(tmp_path, score_options={"mode": "evaluation"})]) == 1
    assert "score_options.temperature is 200.0 there and None now" in capsys.readouterr().err


def test_an_unknown_option_is_one_line(tmp_path, capsys):
    assert main(config(tmp_path, score_options={"temperatur": 200})) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "score grasp has no option 'temperatur': choose mode ('training' or 'evaluation'), temperature" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
