import subprocess
import sys

import pytest

from lottery_lightning.experiments.store import claim, read_json, working_on, write_json


def test_an_equal_config_may_go_on_and_another_is_named_by_its_first_differing_key(tmp_path):
    config = {"lottery": {"run_dir": "a", "levels": 3, "rule": {"rate": 0.2, "pruning": {"rates": {"*x": 0.1}}}}}
    claim(tmp_path, {"lottery": {"levels": 9}})  # nothing is done yet: a mended config takes its place
    claim(tmp_path, config)
    (tmp_path / "trial_0" / "tickets").mkdir(parents=True)
    (tmp_path / "trial_0" / "tickets" / "level_00.safetensors").touch()
    before = (tmp_path / "config.yaml").read_bytes()
    claim(tmp_path, config)
    claim(tmp_path, {"lottery": config["lottery"] | {"run_dir": "moved"}})
    other = {"lottery": config["lottery"] | {"rule": {"rate": 0.2, "pruning": {"rates": {"*x": 0.3}}}}}
    with pytest.raises(ValueError, match=r"lottery\.rule\.pruning\.rates\.\*x is 0\.1 there and 0\.3 now"):
        claim(tmp_path, other)
    with pytest.raises(ValueError, match=r"lottery\.levels is 3 there and None now"):
        claim(tmp_path, {"lottery": {"rule": config["lottery"]["rule"]}})
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_a_folder_where_someone_works_keeps_its_config_before_anything_is_done(tmp_path):
    claim(tmp_path, {"lottery": {"levels": 9}})
    with working_on(tmp_path / "trial_0"), pytest.raises(ValueError, match=r"lottery\.levels is 9 there and 3 now"):
        claim(tmp_path, {"lottery": {"levels": 3}})
    claim(tmp_path, {"lottery": {"levels": 3}})


def test_a_folder_has_one_worker_and_a_dead_one_frees_it(tmp_path):
    hold = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lottery_lightning.experiments.store import working_on\n"
        "with working_on(Path(sys.argv[1])) as mine:\n"
        "    print(mine, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline().strip() == "True"
    with working_on(tmp_path) as mine:
        assert mine is False
    other.kill()
    other.communicate()
    with working_on(tmp_path) as mine:
        assert mine is True


def test_json_is_read_back_and_absent_is_none(tmp_path):
    assert read_json(tmp_path / "absent.json") is None
    write_json(tmp_path / "a" / "b.json", {"x": [1, None]})
    assert read_json(tmp_path / "a" / "b.json") == {"x": [1, None]}
