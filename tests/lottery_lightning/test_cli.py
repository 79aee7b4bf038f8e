import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lottery_callbacks import Ticket
from lottery_lightning.cli import main

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
FIT = str(ROOT / "configs" / "fit_digits.yaml")


def tiny(run_dir, *more):
    options = ["--run_dir", str(run_dir), "--levels", "2", "--training.max_steps", "20", *more]
    return ["lottery", "--config", QUICKSTART, *options]


def edited(tmp_path, old, new):
    text = Path(QUICKSTART).read_text()
    assert old in text
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(old, new).replace("runs/quickstart", str(tmp_path / "run")))
    return ["lottery", "--config", str(path)]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rate: 0.2", "rat: 0.2", "'rat'"),
        ("widths", "width", "'width'"),
        ("levels: 9", "levels: nine", '"levels"'),
        ("levels: 9", "level: 9", "'level'"),
        ("rate: 0.2", "rate: 1.5", "rate=1.5 is outside (0, 1)"),
        ("*output", "*outptu", "'*outptu.weight'"),
        ("val_every: 10it", "val_every: 10", '"training.val_every"'),
        ("threads: 1", "threads: 1, trainer: {acelerator: cpu}", "acelerator"),
        ("reinit: 1", "renit: 1", "renit"),
        ("rate: 0.2", "rewind: 300it", "rewind=300it is not before training.max_steps=300"),
        ("threads: 1", "threads: 1, trainer: {max_steps: 10}", "max_steps: the experiment sets that itself"),
        ("rate: 0.2", "rewind: soon", "'soon' is no step string"),
        ("levels: 9", "levels: 0", "levels=0"),
    ],
)
def test_a_mistake_in_a_config_is_one_line_and_leaves_no_folder(tmp_path, capsys, old, new, said):
    assert main(edited(tmp_path, old, new)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert said in error[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lotery"], "'lotery' is no command: choose lottery, subset-sum"),
        (["lottery", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["lottery", "--config", QUICKSTART, "--levls", "3"], "--levls"),
        (["fit", "--config", FIT, "--trainer.max_stps", "3"], "max_stps"),
        (["fit", "--config", FIT, "--data.init_args.batchsize", "3"], "batchsize"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, arguments, said):
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("error: ")]) == 1
    assert said in error[-1]


def test_a_config_that_is_no_yaml_or_has_no_command(tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_text("lottery: [")
    assert main(["--config", str(path)]) == 1
    assert "broken.yaml is no YAML" in capsys.readouterr().err
    path.write_text("raffle: {levels: 3}")
    assert main(["--config", str(path)]) == 1
    assert "'raffle' and no command" in capsys.readouterr().err


def test_help_and_version_name_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("lottery", "fit", "validate", "test", "predict"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lottery-lightning ")


@pytest.mark.parametrize(("command", "config"), [("lottery", QUICKSTART), ("fit", FIT)])
def test_print_config_is_complete_and_can_be_given_back(tmp_path, capsys, command, config):
    with pytest.raises(SystemExit) as stop:
        main([command, "--config", config, "--print_config"])
    assert stop.value.code == 0
    first = capsys.readouterr().out
    path = tmp_path / "complete.yaml"
    path.write_text(first)
    with pytest.raises(SystemExit):
        main([command, "--config", str(path), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(first)
    if command == "lottery":
        whole = yaml.safe_load(first)
        assert whole["training"]["checkpoint_seconds"] == 30.0  # a default that the file does not write
        assert whole["data"]["class_path"] == "lottery_lightning.data.Digits"


def test_the_lottery_from_the_command_line(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(tiny(run_dir)) == 0
    out = capsys.readouterr().out.strip().splitlines()
    last = json.loads(out[-1])
    assert last["experiment"] == "lottery"
    assert out[-2].endswith(".")
    assert "as accurate" in out[-2]
    table = [line for line in out if line.startswith("│")]
    assert len(table) == 3  # one row a level
    assert "left dense: network.hidden.0.bias (bias)" in "\n".join(out)
    for name in ("results.csv", "results.json", "lottery.png", "config.yaml"):
        assert (run_dir / name).stat().st_size
    tickets = sorted((run_dir / "trial_0" / "tickets").iterdir())
    assert [Ticket.load(path).level for path in tickets] == [0, 1, 2, 3]


def test_the_same_command_again_shows_the_table_and_trains_nothing(tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    assert main(tiny(run_dir, "--controls", "{reinit: 1}")) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.json") if path.name == "result.json"}
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", None)  # a second fit would fail
    assert main(tiny(run_dir, "--controls", "{reinit: 1}")) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")] == table
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_config_in_the_same_folder_is_refused_by_its_key(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(tiny(run_dir, "--levels", "1", "--controls", "{}")) == 0
    results = (run_dir / "results.csv").read_bytes()
    assert main(tiny(run_dir, "--levels", "1", "--controls", "{}", "--rule.rate", "0.3")) == 1
    error = capsys.readouterr().err.strip()
    assert "lottery.rule.rate is 0.2 there and 0.3 now" in error
    assert (run_dir / "results.csv").read_bytes() == results


def test_a_config_serves_with_an_equals_sign_and_a_fit_config_serves_every_lightning_command(tmp_path, capsys):
    options = ["--run_dir", str(tmp_path / "run"), "--levels", "1", "--controls", "{}", "--training.max_steps", "20"]
    assert main([f"--config={QUICKSTART}", *options]) == 0
    root = ["--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false"]
    assert main(["test", f"--config={FIT}", *root, "--trainer.enable_progress_bar", "false"]) == 0
    assert "test/acc" in capsys.readouterr().out


def test_a_mended_config_may_take_the_folder_of_one_that_never_began(tmp_path, capsys):
    small = str(ROOT / "configs" / "lth" / "lenet_mnist_small.yaml")
    run = ["lottery", "--config", small, "--run_dir", str(tmp_path / "run"), "--data.init_args.download", "false"]
    assert main([*run, "--data.init_args.data_dir", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: MNIST cannot be read in {tmp_path / 'nowhere'}")
    assert len(error.splitlines()) == 1
    assert main([*run, "--data.init_args.data_dir", str(tmp_path / "elsewhere")]) == 1
    assert "MNIST cannot be read" in capsys.readouterr().err  # and not: another experiment


def test_the_debug_variable_shows_where_an_error_comes_from(monkeypatch):
    monkeypatch.setenv("LOTTERY_DEBUG", "1")
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist"):
        main(["lottery", "--config", "nowhere.yaml"])


def test_train_py_reports_errors_by_its_exit_code(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "lottery", "--config", "absent.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: config absent.yaml does not exist: give the path of a YAML file"


def test_fit_validate_test_and_predict_are_lightning_cli(tmp_path, capsys):
    root = ["--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", FIT, *root, "--trainer.max_steps", "40", "--trainer.val_check_interval", "20"]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    plain = yaml.safe_load(Path(FIT).read_text())["fit"]
    own = tmp_path / "evaluate.yaml"
    own.write_text(yaml.safe_dump({"model": plain["model"], "data": plain["data"]}))
    for command in ("validate", "test", "predict"):
        given = ["--config", str(own), "--ckpt_path", str(checkpoint), "--trainer.logger", "false"]
        assert main([command, *given, *root]) == 0
    shown = capsys.readouterr().out
    assert "val/acc" in shown
    assert "test/acc" in shown
