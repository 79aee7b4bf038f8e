import pytest
import torch

from lottery_callbacks import IterativeMagnitudePruning
from lottery_lightning.data import Digits
from lottery_lightning.experiments import Lottery, Training
from lottery_lightning.experiments.runs import Run, Runner, stable_seed
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier

SHORT = Training(max_steps=20, val_every="10it", threads=1)


def dense():
    return ImageClassifier(Dense([64, 20, 10]))


def do(folder, model=None, data=None, training=SHORT, seed=0):
    runner = Runner(model or dense(), data or Digits(), training, "test")
    run = Run(folder / "level_00", 0, 0, "ticket")
    return runner.do(run, seed, IterativeMagnitudePruning(run_dir=folder))


def test_a_run_depends_on_its_seed_alone(tmp_path):
    first, torch_noise = do(tmp_path / "a"), torch.randn(3)
    assert do(tmp_path / "b") == first
    assert do(tmp_path / "c", seed=1) != first
    assert torch_noise.shape == (3,)


def test_the_seed_of_the_data_is_added_to_that_of_the_trial(tmp_path):
    assert do(tmp_path / "a", data=Digits(data_seed=5)) != do(tmp_path / "b")


def test_the_record_is_of_the_best_weights_and_of_the_last(tmp_path):
    record = do(tmp_path)
    assert [row["iteration"] for row in record["curve"]] == [10, 20]
    assert record["min_val_loss"] == min(row["val/loss"] for row in record["curve"])
    best = torch.load(tmp_path / "level_00" / "best.ckpt", weights_only=True)
    assert best["global_step"] == record["early_stop_iteration"]
    data, model = Digits(), dense()
    data.setup("test")
    images, labels = data.splits["test"]
    for name, key in (("best", "test_acc_early_stop"), ("final", "test_acc_end")):
        weights = torch.load(tmp_path / "level_00" / f"{name}.ckpt", weights_only=True)["state_dict"]
        model.load_state_dict(weights)
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
        assert record[key] == pytest.approx(accuracy, abs=1e-6)
    assert not (tmp_path / "level_00" / "resume").exists()


def test_a_best_checkpoint_of_another_step_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lottery_callbacks.ValidationCurve.early_stop_iteration", property(lambda self: 7))
    with pytest.raises(ValueError, match=r"best\.ckpt is of step \d+ and not of the best, 7"):
        do(tmp_path)
    assert not (tmp_path / "level_00" / "result.json").exists()


def test_a_model_that_logs_no_test_accuracy_is_told_so(tmp_path):
    class Silent(ImageClassifier):
        def test_step(self, batch, batch_idx):
            self.log("test/error", 0.5, batch_size=1)

    with pytest.raises(ValueError, match="logs no 'test/acc' in test_step: it logs test/error"):
        do(tmp_path, Silent(Dense([64, 20, 10])))


def test_several_processes_a_run_are_refused_in_favour_of_several_commands(tmp_path):
    training = Training(max_steps=20, val_every="10it", trainer={"accelerator": "cpu", "devices": 2})
    with pytest.raises(ValueError, match="start the command once per device"):
        do(tmp_path, training=training)


@pytest.mark.parametrize("key", ["max_steps", "callbacks", "logger", "accumulate_grad_batches", "default_root_dir"])
def test_what_the_experiment_decides_is_no_option_of_the_trainer(key):
    with pytest.raises(ValueError, match=f"training.trainer names {key}: the experiment sets that itself"):
        Training(trainer={key: 1})


def test_trials_differ_in_their_start_and_controls_keep_the_counts(tmp_path):
    Lottery(dense(), Digits(), tmp_path, levels=2, trials=2, training=SHORT).run()
    weights = [
        torch.load(tmp_path / f"trial_{trial}" / "level_00" / "final.ckpt", weights_only=True)["state_dict"]
        for trial in (0, 1)
    ]
    assert not torch.equal(weights[0]["network.output.weight"], weights[1]["network.output.weight"])
    final = {
        path.parent.name: torch.load(path, weights_only=True)["state_dict"]
        for path in (tmp_path / "trial_0").glob("level_02*/final.ckpt")
    }
    assert sorted(final) == ["level_02", "level_02_layerwise_random_0", "level_02_one_shot_0", "level_02_reinit_0"]
    names = [name for name in final["level_02"] if name.endswith("weight")]
    kept = {arm: [int((state[name] != 0).sum()) for name in names] for arm, state in final.items()}
    assert kept["level_02"] == [819, 128]  # of 1280 and 200: 1024 - 205, 160 - 32
    assert all(counts == kept["level_02"] for counts in kept.values())
    same = {
        arm: bool(torch.equal(state[names[0]] != 0, final["level_02"][names[0]] != 0)) for arm, state in final.items()
    }
    assert same["level_02_reinit_0"]
    assert not same["level_02_layerwise_random_0"]


def test_a_level_of_the_experiment_is_the_same_alone_or_in_a_whole_plan(tmp_path):
    Lottery(dense(), Digits(), tmp_path / "whole", levels=2, training=SHORT).run()
    Lottery(dense(), Digits(), tmp_path / "tickets", levels=2, controls={}, training=SHORT).run()
    for name in ("level_01/result.json", "level_02/result.json", "tickets/level_03.safetensors"):
        assert (tmp_path / "whole/trial_0" / name).read_bytes() == (tmp_path / "tickets/trial_0" / name).read_bytes()


def test_seeds_are_stable_numbers():
    assert stable_seed(0, 1, "ticket", 0) == stable_seed(0, 1, "ticket", 0)
    assert stable_seed(0, 1, "ticket", 0) != stable_seed(0, 1, "ticket", 1)
    assert 0 <= stable_seed("x") < 2**31
