"""Tickets and `functional` with torch and safetensors alone; names of the package that are imported when used."""

import subprocess
import sys
import textwrap

import pytest

import lottery_callbacks

BLOCKED = (
    "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "numpy", "scipy",
    "matplotlib", "curvlinops", "numba", "torchvision", "jsonargparse", "yaml", "lottery_lightning",
)  # fmt: skip
BLOCK = f"""
import sys, warnings

for name in {BLOCKED}:
    sys.modules[name] = None  # as if it were not installed
warnings.simplefilter("ignore")  # torch says that NumPy is absent
import torch
from torch import nn
"""


def alone(code, *arguments):
    """What `code` prints, and writes to stderr, in a process without Lightning and NumPy."""
    command = [sys.executable, "-c", BLOCK + textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_all_of_functional_imports_and_nothing_blocked_was_loaded():
    code = f"""
        import importlib, pkgutil
        import lottery_callbacks.functional as functional
        for found in pkgutil.walk_packages(functional.__path__, "lottery_callbacks.functional."):
            if not found.name.endswith("subset_sum_kernels"):  # the extra `subset-sum`
                importlib.import_module(found.name)
                print(found.name)
        assert not [name for name in sys.modules if sys.modules[name] and name.split(".")[0] in {BLOCKED}]
        """
    assert len(alone(code)[0].split()) > 35


def test_a_ticket_is_made_saved_loaded_applied_and_trained(tmp_path):
    code = """
        import lottery_callbacks
        from lottery_callbacks import RewindPoint, Ticket
        from lottery_callbacks.functional import masks as M
        from lottery_callbacks.functional.optimizer_hooks import train_under_masks
        from lottery_callbacks.functional.scopes import SCOPES
        from lottery_callbacks.functional.scores import SCORES
        from lottery_callbacks.rewinding import snapshot

        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        weights = {name: p for name, p in net.named_parameters() if p.ndim == 2}
        masks = M.keep_highest({n: w.detach().abs() for n, w in weights.items()}, M.ones(weights), {tuple(weights): 21})
        path = Ticket(masks, RewindPoint(0, snapshot(net)), {"level": 1}).save(sys.argv[1])
        ticket = Ticket.load(path)
        print(ticket)
        assert M.digest(ticket.masks) == M.digest(masks)
        inner = ticket.as_submodule("net").for_submodule("net")
        fresh = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        fresh.load_state_dict(inner.state_dict())
        optimizer = torch.optim.AdamW(inner.apply_(fresh).parameters())
        with train_under_masks(fresh, inner.masks, optimizer):
            fresh(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
        from torch.nn.utils import prune
        prune.l1_unstructured(net[0], "weight", 0.5)
        assert Ticket.from_state_dict(net.state_dict()).density == 0.5
        ticket.apply_(fresh.bfloat16())  # a line says that values are rounded
        assert SCORES and SCOPES and lottery_callbacks.ticket.Ticket is Ticket
        """
    printed, said = alone(code, tmp_path / "ticket.safetensors")
    assert printed.startswith("Ticket(level 1, density 0.5, kept 21 of 42 weights, masks 2, RewindPoint(step 0,")
    assert "rounded to the network's precision, torch.float32 to torch.bfloat16: 0.weight" in said
    ticket = lottery_callbacks.Ticket.load(tmp_path / "ticket.safetensors")
    assert ticket.save(tmp_path / "with_numpy").read_bytes() == (tmp_path / "ticket.safetensors").read_bytes()


def test_every_public_name_is_found_listed_and_the_one_that_its_module_defines():
    assert set(lottery_callbacks.__all__) <= set(dir(lottery_callbacks))
    assert set(lottery_callbacks._HOMES) | {"StrongNetwork", "strong_network"} == set(lottery_callbacks.__all__)
    for name, home in lottery_callbacks._HOMES.items():
        assert getattr(lottery_callbacks, name).__module__ == f"lottery_callbacks.{home}"
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = lottery_callbacks.absent
    with pytest.raises(ImportError, match="cannot import name 'Absent'"):
        exec("from lottery_callbacks import Absent")


def test_a_callback_needs_lightning_and_a_module_does_not_take_the_place_of_an_export():
    code = """
        import lottery_callbacks.strong_network
        import lottery_callbacks.strong_file
        from lottery_callbacks import strong_network
        print(type(strong_network).__name__, type(lottery_callbacks.chain_of).__name__)
        assert "ApplyTicket" in dir(lottery_callbacks)
        try:
            from lottery_callbacks import ApplyTicket
        except ModuleNotFoundError as error:
            print(error)
        """
    first, second = alone(code)[0].splitlines()
    assert first == "function module"
    assert "lightning" in second


def test_lightning_cli_knows_the_callbacks_by_their_short_and_public_names():
    code = """
        from lightning.pytorch.cli import LightningCLI
        from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
        import lottery_callbacks
        LightningCLI(BoringModel, BoringDataModule)
        """
    names = ("--trainer.callbacks+=SparsityMonitor", "--trainer.callbacks+=lottery_callbacks.GradualPruning")
    command = [sys.executable, "-c", textwrap.dedent(code), "fit", *names, "--trainer.callbacks.sparsity=0.5"]
    command += ["--trainer.callbacks.pruning.scope=global"]
    printed = subprocess.run([*command, "--print_config"], capture_output=True, text=True, check=True).stdout
    assert "class_path: lottery_callbacks.SparsityMonitor" in printed
    assert "class_path: lottery_callbacks.GradualPruning" in printed
    assert "class_path: lottery_callbacks.Pruning" in printed
