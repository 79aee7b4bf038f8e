"""Stopwatches, memory and rounds, for `bench_training.py`."""

import ctypes
import gc
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import torch
from bench_loops import wait

# Lightning sets it to 1, and torch built for CUDA then looks for GPUs in each step of an optimizer, 0.1 ms on a CPU.
NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
SECONDS = 0.2  # of calling one part of a step again and again


class Laps(L.Callback):
    """The seconds of the parts of a run, each measured up to its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def end(self, part: str) -> None:
        now = wait()
        self.seconds[part] += now - self.last
        self.last = now

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.end("model_and_trainer" if stage == "fit" else "checkpoints")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end("set_up")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end("training")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.end("prune_and_ticket" if stage == "fit" else "tests")


def interleaved(
    title: str, timers: Mapping[str, Callable[[], float]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """What each timer returns in each round, and the peak of its memory; each round begins with another one."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    peaks: dict[str, float | None] = dict.fromkeys(timers)
    names, began = list(timers), time.perf_counter()
    for done in range(rounds * len(names)):
        turn, place = divmod(done, len(names))
        name = names[(turn + place) % len(names)]
        left = (time.perf_counter() - began) * (rounds * len(names) / done - 1) if done else 0
        say(f"{title}: round {turn + 1} of {rounds}, {name}" + (f", {left:,.0f} s left of this part" if done else ""))
        give_back()
        known = forget_peak(device)
        found[name].append(timers[name]())
        peaks[name] = max(filter(None, (peaks[name], peak(device))), default=None) if known else None
    return found, peaks


def repeated(call: Callable[[], Any], nvml: str = "0") -> float:
    """Microseconds of a call, over many."""
    with patch.dict(os.environ, {NVML: nvml}):
        call()
        began, count = wait(), 0
        while time.perf_counter() - began < SECONDS:
            call()
            count += 1
        return 1e6 * (wait() - began) / count


def forget_peak(device: torch.device) -> bool:
    """Begin a new peak of memory; whether the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak(device: torch.device) -> float | None:
    """MiB since then: of tensors on CUDA, else of the process."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else status("VmHWM")


def status(key: str) -> float | None:
    """A size of this process in MiB, where Linux tells it."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)


def give_back() -> None:
    """Collect garbage, and return free pages to the system where the C library can: else they look like growth."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Listener(L.Callback):
    """Hears each backward pass and each step, and does nothing."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: None)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass


@contextmanager
def hidden() -> Iterator[None]:
    """What is printed is lost, and what prints it takes this for a terminal."""
    terminal = patch.dict(os.environ, TTY_COMPATIBLE="1")
    with terminal, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def say(line: str) -> None:
    """Replace the line of progress."""
    print(f"\r{line:<100}", end="" if line else "\r", file=sys.stderr, flush=True)
