"""Strong tickets: random networks that are pruned, never trained, into the approximation of a trained one."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from lottery_callbacks.chain_of import chain_of
from lottery_callbacks.functional.strong_edges import Inputs, Split
from lottery_callbacks.messages import describe
from lottery_callbacks.strong_file import save_strong_ticket
from lottery_callbacks.strong_network import StrongNetwork, strong_network
from lottery_lightning.experiments.needs import Needs
from lottery_lightning.experiments.runs import Training, stable_seed
from lottery_lightning.experiments.store import write_csv
from lottery_lightning.experiments.strong_tickets_report import report
from lottery_lightning.experiments.targets import Row, Targets, Work

SHARE = 0.2  # of a training's time, for a ticket


class StrongTickets:
    """In each trial a network is trained, and then found again inside random networks of twice its depth.

    Two random layers with 2n hidden units for each input, uniform on (-1, 1), stand for a layer W x + b of the target;
    a part of them is kept (`lottery_callbacks.strong_network`). Arms, for each n:

    - any size: sums of any number of products (Pensia et al., arXiv 2006.07990).
    - k: exactly k products for each weight and sign (Natale et al., arXiv 2410.14754), for each of `sizes`.
    - smallest: the fewest within a tolerance, of the rescaled weights, for each of `tolerances`.

    Of each: the counts of kept weights and the density, errors of weights, blocks without enough units, weights out of
    reach, the largest error on the unit ball as proved and as found by search (both divided by the product of the
    layers' norms), and test accuracy. All kept weights are regenerated from their addresses and compared. Finished arms
    are skipped on a rerun, a torn training is resumed. At the end: table, results.csv, figure, one sentence of finding,
    one line of JSON; each arm's folder has its ticket (`load_strong_ticket`).

    Args:
        model: the LightningModule; it logs `val/loss` and `test/acc`, and is initialised by `reset_parameters`.
        data: the data module; its `data_seed`, if it has one, is added to the trial's seed.
        run_dir: where everything is kept.
        network: the submodule that is approximated, a chain of layers; see `strong_network`.
        ns: half the hidden units of an input, of each random network.
        sizes: the fixed sizes k.
        any_size: the n whose sums of any size are an arm; at n = 30 LeNet's take 7 minutes of 2 cores.
        tolerances: of the smallest sums.
        split: see `strong_network`.
        inputs: "nonnegative" where the data are >= 0, which halves a ticket.
        trials: number of trials; trial t has seed `seed + t`.
        training: how the network is trained; its last weights are the target.
        search_steps: of the gradient ascent; 0 leaves out the search.
        seed: of the first trial.
    """

    def __init__(
        self,
        model: L.LightningModule,
        data: L.LightningDataModule,
        run_dir: Path,
        network: str = "network",
        ns: Sequence[int] = (21, 30),
        sizes: Sequence[int] = (2, 3, 4),
        any_size: Sequence[int] = (),
        tolerances: Sequence[float] = (0.01,),
        split: Split = "sign",
        inputs: Inputs = "any",
        trials: int = 1,
        training: Training = Training(),
        search_steps: int = 200,
        seed: int = 0,
    ) -> None:
        if not ns or min(ns) < 1 or min(sizes, default=1) < 1 or min(tolerances, default=1) <= 0:
            raise ValueError(f"ns={list(ns)}, sizes={list(sizes)}, tolerances={list(tolerances)}: all are above 0")
        if not set(any_size) <= set(ns):
            raise ValueError(f"any_size={list(any_size)} names an n that is none of ns={list(ns)}")
        questions: dict[str, dict[str, Any]] = {f"k = {size}": {"size": size} for size in sizes}
        questions |= {f"smallest, {tolerance:g}": {"tolerance": tolerance} for tolerance in tolerances}
        arms = {f"n = {n}, any size": (n, {}) for n in any_size}
        self.arms: dict[str, tuple[int, dict[str, Any]]] = arms | {
            f"n = {n}, {name}": (n, question) for n in ns for name, question in questions.items()
        }
        given = len(any_size) + len(ns) * (len(sizes) + len(tolerances))
        if len(self.arms) < given or not given:
            raise ValueError("ns, any_size, sizes, tolerances: give each of them once, and one question at least")
        if network not in dict(model.named_modules()):
            known = describe([name for name, _ in model.named_children()])
            raise ValueError(f"network={network!r} is no submodule of {type(model).__name__}: there are {known}")
        chain_of(model.get_submodule(network))  # names a layer that cannot be treated
        self.targets = Targets(model, data, Path(run_dir), trials, training, seed, Needs(batch=self._check_inputs))
        self.run_dir, self.network, self.search_steps = Path(run_dir), network, search_steps
        self.options: dict[str, Any] = {"split": split, "inputs": inputs}
        self.miss = min(tolerances, default=0.01)

    def run(self) -> None:
        """Do what is not done yet, then report; a trial that another process works on is left to it."""
        arms = {name: partial(self._find, n, question) for name, (n, question) in self.arms.items()}
        if rows := self.targets.run(arms, self.options, SHARE):
            report(rows, self.run_dir)

    def _find(self, n: int, question: dict[str, Any], work: Work) -> Row:
        """Put the ticket in the network's place; what was found of it."""
        target, shape, began = work.model.get_submodule(self.network), self._shape(work), time.perf_counter()
        seed = stable_seed(work.seed, "strong ticket", n)
        ticket = strong_network(target, seed=seed, n=n, progress=work.progress.tell, **question, **self.options)
        seconds = time.perf_counter() - began
        ticket.verify()
        save_strong_ticket(ticket, work.run.run_dir / "ticket.safetensors")
        limit = question.get("tolerance", self.miss)
        problems = list(problems_of(ticket, limit))
        if problems:
            write_csv(work.run.run_dir / "problems.csv", problems)
        kinds = [problem["problem"] for problem in problems]
        errors, counts, weights = ticket.errors, ticket.counts, ticket.weights
        found: Row = {
            "n": n,
            "size": question.get("size"),
            "tolerance": question.get("tolerance"),
            **counts._asdict(),
            "kept": sum(counts),
            "weights": weights,
            "kept_ratio": sum(counts) / weights,
            "layers": len(ticket.tickets),
            "parameters": ticket.random_parameters,
            "overparameterisation": ticket.random_parameters / weights,
            "density": ticket.density,
            "miss_limit": limit,
            "misses": kinds.count("miss"),
            "infeasible": kinds.count("too few units"),
            "out_of_reach": kinds.count("out of reach"),
            "median_error": errors.median().item(),
            "max_error": errors.max().item(),
            "certified": ticket.certificate(shape).normalised,
            "found": ticket.searched_error(self.search_steps, shape=shape).normalised if self.search_steps else None,
            "seconds": seconds,
        }
        work.model.set_submodule(self.network, ticket)
        numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
        return found | {"accuracy": work.runner.test(work.run, work.model, numbers)}

    def _shape(self, work: Work) -> torch.Size:
        """Of one input."""
        data = work.runner.data
        data.prepare_data()
        data.setup("test")
        batch = next(iter(data.test_dataloader()))
        self._check_inputs(work.model, batch)
        return batch[0].shape[1:]

    def _check_inputs(self, module: L.LightningModule, batch: Any) -> None:
        inputs, *_ = batch
        if self.options["inputs"] == "nonnegative" and (inputs < 0).any():
            raise ValueError("inputs='nonnegative', but the data have values below 0: leave it 'any'")


def problems_of(ticket: StrongNetwork, limit: float) -> Iterator[Row]:
    """Errors above the limit, blocks with too few units and weights out of reach, one by one."""
    for module, layer in zip(ticket.strong, ticket.tickets, strict=True):
        row = {"layer": module.name}
        for part, sign in zip(layer.errors, layer.random.signs, strict=True):
            for output, place in (part > limit).nonzero().tolist():
                at = {"input": place, "sign": sign, "output": output}
                yield row | {"problem": "miss", **at, "error": part[output, place].item()}
        for (output,) in (layer.bias_errors > limit).nonzero().tolist():
            at = {"input": -1, "sign": 1, "output": output}
            yield row | {"problem": "miss", **at, "error": layer.bias_errors[output].item()}
        for block in layer.infeasible:
            yield row | {"problem": "too few units", **block._asdict(), "output": None, "error": None}
        for one in layer.out_of_reach:
            at = one.block._asdict() | {"output": one.output}
            yield row | {"problem": "out of reach", **at, "error": one.error}
