import os
import warnings
import zipfile

import pytest
import torch

from lottery_callbacks import ResumeCheckpoint, ValidationCurve, newest_checkpoint


@pytest.fixture
def fitted(make_module, loaders, make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.fit(make_module(), *loaders)
    return trainer


@pytest.fixture
def save(fitted, tmp_path):
    """Saves a real checkpoint under a name, made so many seconds after the epoch."""

    def write(name, made_at, weights_only=False):
        path = tmp_path / "run" / name
        fitted.save_checkpoint(path, weights_only=weights_only)
        os.utime(path, (made_at, made_at))
        return path

    return write


def torn_warnings(folder):
    """What was found, and the file names that warnings called torn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = newest_checkpoint(folder)
    return found, [str(w.message).split(" is torn and is passed over")[0].rsplit("/", 1)[-1] for w in caught]


def test_the_newest_is_found_by_its_time_and_in_sub_folders(save, tmp_path):
    save("z.ckpt", 1_000)
    newest = save("deep/er/a.ckpt", 3_000)
    save("m.ckpt", 2_000)
    assert torn_warnings(tmp_path / "run") == (newest, [])
    os.utime(tmp_path / "run" / "z.ckpt", (4_000, 4_000))
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "z.ckpt"


def test_an_empty_or_absent_folder_has_none(tmp_path):
    assert torn_warnings(tmp_path) == (None, [])
    assert torn_warnings(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize("left", [0, 1, 100, 0.3, 0.9, -1], ids=str)
def test_a_truncated_file_is_passed_over_with_a_warning(save, tmp_path, left):
    old, new = save("old.ckpt", 1_000), save("new.ckpt", 2_000)
    whole = new.read_bytes()
    new.write_bytes(whole[: round(left * len(whole)) if isinstance(left, float) else left])
    os.utime(new, (2_000, 2_000))
    assert torn_warnings(tmp_path / "run") == (old, ["new.ckpt"])


def test_garbage_and_a_flipped_bit_are_passed_over_with_a_warning(save, tmp_path):
    old, new = save("old.ckpt", 1_000), save("new.ckpt", 2_000)
    with zipfile.ZipFile(new) as archive:
        stored = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        tensor = archive.read(max(stored, key=lambda entry: entry.file_size))
    content = bytearray(new.read_bytes())
    place = content.index(tensor) + len(tensor) // 2
    content[place] ^= 1
    new.write_bytes(content)
    (tmp_path / "run" / "newest.ckpt").write_bytes(b"\x80\x02garbage" * 50)
    os.utime(new, (2_000, 2_000))
    os.utime(tmp_path / "run" / "newest.ckpt", (3_000, 3_000))
    assert torn_warnings(tmp_path / "run") == (old, ["newest.ckpt", "new.ckpt"])


def test_weights_alone_are_no_place_to_resume_from_and_no_reason_to_warn(save, tmp_path):
    save("final.ckpt", 2_000, weights_only=True)
    assert torn_warnings(tmp_path / "run") == (None, [])
    resumable = save("resume.ckpt", 1_000)
    assert torn_warnings(tmp_path / "run") == (resumable, [])


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"optimizer_states": [Trap()]}, tmp_path / "trap.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "trap.ckpt"
    assert not (tmp_path / "sprung").exists()


def steps(folder):
    return sorted(torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt"))


def test_resume_checkpoint_keeps_the_two_newest_of_a_fit(make_module, loaders, make_trainer, tmp_path):
    saver = ResumeCheckpoint(tmp_path / "resume", seconds=0)
    make_trainer(callbacks=[saver], enable_checkpointing=True).fit(make_module(), *loaders)
    assert steps(tmp_path / "resume") == [6, 8]
    newest = newest_checkpoint(tmp_path / "resume")
    assert torch.load(newest, weights_only=True)["global_step"] == 8


def test_resume_checkpoint_keeps_two_also_after_a_resumption(make_module, loaders, make_trainer, tmp_path):
    for max_steps in (4, 6, 10):
        saver = ResumeCheckpoint(tmp_path / "resume", seconds=0)
        trainer = make_trainer(callbacks=[saver], enable_checkpointing=True, max_steps=max_steps)
        trainer.fit(make_module(), *loaders, ckpt_path=newest_checkpoint(tmp_path / "resume"))
        assert steps(tmp_path / "resume") == [max_steps - 2, max_steps]


def test_resume_checkpoint_waits_between_two(make_module, loaders, make_trainer, tmp_path):
    saver = ResumeCheckpoint(tmp_path / "resume", seconds=1e6)
    make_trainer(callbacks=[saver], enable_checkpointing=True).fit(make_module(), *loaders)
    assert steps(tmp_path / "resume") == []


def test_resume_checkpoint_writes_neither_at_a_sanity_check_nor_outside_a_fit(
    make_module, loaders, make_trainer, tmp_path
):
    module, folder = make_module(), tmp_path / "resume"
    trainer = make_trainer(
        callbacks=[ResumeCheckpoint(folder, seconds=0)], enable_checkpointing=True, num_sanity_val_steps=2, max_steps=2
    )
    trainer.validate(module, loaders[1], verbose=False)
    assert steps(folder) == []
    trainer.fit(module, *loaders)
    assert steps(folder) == [2]


def test_resume_checkpoint_leaves_other_files_alone(make_module, loaders, make_trainer, tmp_path):
    folder = tmp_path / "resume"
    folder.mkdir()
    for name in ("best.ckpt", "notes.txt"):
        (folder / name).write_text("mine")
    saver = ResumeCheckpoint(folder, seconds=0)
    make_trainer(callbacks=[saver], enable_checkpointing=True).fit(make_module(), *loaders)
    assert {path.name for path in folder.iterdir()} == {
        "best.ckpt", "notes.txt", "resume-step=6.ckpt", "resume-step=8.ckpt",
    }  # fmt: skip


def test_a_checkpoint_holds_the_other_callbacks_after_the_same_validation(make_module, loaders, make_trainer, tmp_path):
    curve = ValidationCurve()
    saver = ResumeCheckpoint(tmp_path / "resume", seconds=0)
    make_trainer(callbacks=[saver, curve], enable_checkpointing=True).fit(make_module(), *loaders)
    for path in (tmp_path / "resume").iterdir():
        state = torch.load(path, weights_only=True)
        assert state["callbacks"][curve.state_key]["rows"][-1]["iteration"] == state["global_step"]


def test_a_fit_resumed_from_it_validates_where_the_unbroken_one_does(make_module, loaders, make_trainer, tmp_path):
    curves = []
    for max_steps in (4, 8):
        curve, saver = ValidationCurve(), ResumeCheckpoint(tmp_path / "resume", seconds=0)
        trainer = make_trainer(callbacks=[curve, saver], enable_checkpointing=True, max_steps=max_steps)
        trainer.fit(make_module(), *loaders, ckpt_path=newest_checkpoint(tmp_path / "resume"))
        curves.append([row["iteration"] for row in curve.rows])
    assert curves == [[2, 4], [2, 4, 6, 8]]
