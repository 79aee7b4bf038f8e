import csv
import itertools
import json
import subprocess
import sys

import pytest
import torch

from lottery_callbacks.functional.bounds import counting_size
from lottery_lightning.cli import main
from lottery_lightning.experiments import SubsetSum
from lottery_lightning.experiments.runs import stable_seed
from lottery_lightning.experiments.subset_sum_report import crossings_of, sentence, success_rows, wilson


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_cell_is_the_brute_force_answer_of_its_own_draws(tmp_path):
    SubsetSum(tmp_path, sizes=[2], eps=[0.3, 0.05], trials=40, largest=6, largest_any=5, seed=3).run()
    success = {(r["size"], r["target"], int(r["n"]), float(r["eps"])): r for r in rows(tmp_path / "success.csv")}
    errors = {(r["size"], r["target"], int(r["n"])): r for r in rows(tmp_path / "errors.csv")}
    assert len(success) == 2 * len(errors) == 2 * (4 + 3 + 3)
    for size, target, n in ((2, "uniform", 5), (2, "zero", 6), (None, "uniform", 4)):
        generator = torch.Generator().manual_seed(stable_seed(3, size, target, n))
        samples = torch.rand(40, n, generator=generator, dtype=torch.float64) * 2 - 1
        z = (torch.rand(40, generator=generator, dtype=torch.float64) * 2 - 1) * (2**0.5 if size else 1)
        z = z if target == "uniform" else torch.zeros(40)
        sizes = [size] if size else range(n + 1)
        subsets = [list(s) for k in sizes for s in itertools.combinations(range(n), k)]
        nearest = torch.stack([(samples[:, s].sum(1) - z).abs() for s in subsets]).amin(0)
        for eps in (0.3, 0.05):
            assert float(success[str(size or "any"), target, n, eps]["success"]) == (nearest <= eps).sum().item() / 40
        found = errors[str(size or "any"), target, n]
        assert float(found["median_error"]) == pytest.approx(nearest.quantile(0.5).item(), abs=1e-14)
        assert float(found["error_90"]) == pytest.approx(nearest.quantile(0.9).item(), abs=1e-14)


def test_success_crosses_one_half_at_n_c_and_is_sure_by_twice_that(tmp_path):
    """Claim R1, at k = 3, eps = 0.01: n_c = 12."""
    SubsetSum(tmp_path, sizes=[3], eps=[0.01], trials=1500, largest=24, largest_any=3).run()
    uniform, zero = json.loads((tmp_path / "results.json").read_text())["crossings"]
    assert (uniform["target"], uniform["n_c"], uniform["n_hyp"]) == ("uniform", 12, 9)
    assert 0.45 < uniform["at_n_c"][0] < 0.75
    assert uniform["at_2_n_c"][1] > 0.9
    assert zero["at_n_c"][0] > uniform["at_n_c"][2]  # sums crowd about 0


def test_a_rerun_solves_what_is_missing_alone_and_gives_the_same_files(tmp_path, capsys):
    run = ["subset-sum", "--run_dir", str(tmp_path), "--sizes", "[2]", "--trials", "30", "--largest", "8"]
    run += ["--largest_any", "4", "--eps", "[0.1]"]
    assert main(run) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert json.loads(printed[-1])["experiment"] == "subset-sum"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    lost = tmp_path / "cells" / "2_zero_07" / "result.json"
    lost.unlink()
    assert main(run) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert {path for path, time in kept.items() if path.stat().st_mtime_ns != time} == {lost}
    assert main([*run, "--trials", "31"]) == 1
    assert "subset-sum.trials is 30 there and 31 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [21]}, "choose 2k to 40"),
        ({"sizes": [4], "largest": 7}, "choose 2k to 40"),
        ({"largest_any": 41}, "choose 2k to 40"),
        ({"eps": [0.0]}, "choose 0 < eps < 1"),
        ({"eps": []}, "at least one of each"),
        ({"trials": 0}, "at least one of each"),
        ({"largest_any": -1}, "choose 2k to 40"),
        ({"sizes": [2, 2]}, "give each of them once"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_begins(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        SubsetSum(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_subsets_of_any_size_may_be_left_out_and_two_processes_share_the_cells(tmp_path):
    run = [sys.executable, "-m", "lottery_lightning.cli", "subset-sum", "--run_dir", str(tmp_path), "--sizes", "[2, 3]"]
    run += ["--trials", "2000", "--largest", "16", "--largest_any", "0", "--eps", "[0.1]"]
    processes = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].strip().splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert any("uniform_at_n_c" in lines[-1] for lines in outputs)
    assert "bits_a_sample_any_size" not in (tmp_path / "results.json").read_text()
    assert {row["size"] for row in rows(tmp_path / "success.csv")} == {"2", "3"}
    assert len(rows(tmp_path / "success.csv")) == 2 * (13 + 11)


def test_an_interval_holds_its_rate_and_never_leaves_the_unit_interval():
    for successes in range(21):
        low, high = wilson(successes, 20)
        assert 0 <= low <= successes / 20 <= high <= 1
        assert low < high
    assert wilson(0, 10_000)[1] < 0.0004


def test_sizes_whose_n_c_was_not_measured_or_is_the_least_n_are_left_out():
    cell = {"target": "uniform", "trials": 10, "successes": {"0.1": 5, "0.01": 5}}
    cells = [{"size": 4, "n": n, **cell} for n in (8, 9, 10)] + [{"size": "any", "n": 4, **cell}]
    crossings = list(crossings_of(list(success_rows(cells, [0.1, 0.01]))))
    found = [(row["size"], row["eps"], row["n_c"], row["at_2_n_c"]) for row in crossings]
    assert found == [(4, 0.01, 10, None), ("any", 0.1, 4, None)]
    assert counting_size(4, 0.1) == 8  # = 2 k
    assert sentence({}) == "No n_c was measured."
