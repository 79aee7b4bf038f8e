"""Lets the tests of this folder import `visiting_fits`, under any import mode of pytest."""

import sys
from pathlib import Path

import lightning.pytorch as L
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from visiting_fits import Blobs, Watch


@pytest.fixture
def fit(tmp_path):
    def run(module, *callbacks, data=Blobs, checkpoint=None, seed=11, **options):
        watch = Watch()
        defaults = {
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "num_sanity_val_steps": 0, "max_steps": 40, "max_epochs": -1,
            "default_root_dir": tmp_path, "callbacks": [*callbacks, watch],
        }  # fmt: skip
        trainer = L.Trainer(**defaults | options)
        L.seed_everything(seed, verbose=False)
        trainer.fit(module, data(batch_size=8, eval_batch_size=20), ckpt_path=checkpoint)
        return trainer, watch.steps

    return run
