import csv
import warnings

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lottery_callbacks import (
    ApplyTicket,
    GradualPruning,
    IterativeMagnitudePruning,
    RewindPoint,
    SparsityMonitor,
    Ticket,
)
from lottery_callbacks.rewinding import snapshot

FIRST, LAST = "network.0.weight", "network.4.weight"  # 72 and 36 weights


def ticket_of(module, kept_first, kept_last):
    """A ticket that keeps so many weights, the first ones of each layer."""
    weights = {name: p for name, p in module.named_parameters() if name in (FIRST, LAST)}
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in weights.items()}
    masks[FIRST].view(-1)[:kept_first] = True
    masks[LAST].view(-1)[:kept_last] = True
    return Ticket(masks, RewindPoint(0, snapshot(module)))


def collapse_warnings(caught):
    return [str(w.message) for w in caught if "has collapsed" in str(w.message)]


@pytest.fixture
def fit(make_module, loaders, make_trainer):
    def run(*callbacks, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(callbacks=list(callbacks), max_steps=2, **options).fit(make_module(), *loaders)
        return collapse_warnings(caught)

    return run


def test_it_knows_the_densities_of_the_masks_that_are_trained(fit, make_module):
    monitor = SparsityMonitor()
    assert fit(ApplyTicket(ticket_of(make_module(), 18, 27)), monitor) == []
    assert monitor.densities == {FIRST: 0.25, LAST: 0.75}


def test_its_place_among_the_callbacks_does_not_matter(fit, make_module):
    monitor = SparsityMonitor()
    fit(monitor, ApplyTicket(ticket_of(make_module(), 36, 9)))
    assert monitor.densities == {FIRST: 0.5, LAST: 0.25}


def test_every_level_of_a_lottery_is_seen_as_it_is_trained(make_module, loaders, make_trainer, tmp_path):
    imp, monitor, seen = IterativeMagnitudePruning(rate=0.5, run_dir=tmp_path), SparsityMonitor(), []
    for _ in imp.levels(2):
        make_trainer(callbacks=[imp, monitor], max_steps=2).fit(make_module(), *loaders)
        seen.append(monitor.densities)
    assert seen == [{FIRST: 1.0, LAST: 1.0}, {FIRST: 0.5, LAST: 0.5}, {FIRST: 0.25, LAST: 0.25}]


def test_each_logger_gets_densities_and_counts_at_the_start_of_the_fit(fit, make_module, tmp_path):
    loggers = [CSVLogger(tmp_path, name=name) for name in ("one", "two")]
    fit(ApplyTicket(ticket_of(make_module(), 18, 9)), SparsityMonitor(), logger=loggers)
    wanted = {f"prune/density/{FIRST}": 0.25, f"prune/density/{LAST}": 0.25, "prune/density": 0.25, "prune/kept": 27}
    for logger in loggers:
        with next((tmp_path / logger.name).rglob("metrics.csv")).open() as file:
            first = next(csv.DictReader(file))
        assert {name: float(first[name]) for name in wanted} == wanted
        assert first["step"] == "0"


@pytest.mark.parametrize(("kept_first", "kept_last"), [(1, 36), (0, 20)])
def test_a_collapsed_layer_is_named_in_a_warning(fit, make_module, kept_first, kept_last):
    caught = fit(ApplyTicket(ticket_of(make_module(), kept_first, kept_last)), SparsityMonitor())
    assert caught == [
        f"layer {FIRST} has collapsed: {kept_first} of 72 weights are left; prune it at a lower rate, or exclude it"
    ]


def test_the_threshold_of_the_warning_is_the_density_it_was_given(fit, make_module):
    ticket = ticket_of(make_module(), 18, 18)
    assert fit(ApplyTicket(ticket), SparsityMonitor(min_density=0.24)) == []
    assert [line.split(":")[0] for line in fit(ApplyTicket(ticket), SparsityMonitor(min_density=0.25))] == [
        f"layer {FIRST} has collapsed"
    ]
    assert len(fit(ApplyTicket(ticket), SparsityMonitor(min_density=0.5))) == 2


def test_without_masks_it_says_nothing(fit, tmp_path):
    monitor = SparsityMonitor()
    logger = CSVLogger(tmp_path, name="plain")
    assert fit(monitor, logger=logger) == []
    assert monitor.densities == {}
    assert not any("prune" in path.read_text() for path in (tmp_path / "plain").rglob("metrics.csv"))


def test_it_leaves_the_run_bitwise_unchanged(trace_fit, make_module):
    ticket = ticket_of(make_module(), 10, 10)
    plain = trace_fit(ApplyTicket(ticket))
    assert trace_fit(ApplyTicket(ticket), SparsityMonitor()) == plain
    assert trace_fit(SparsityMonitor(), ApplyTicket(ticket)) == plain
    assert trace_fit(ApplyTicket(ticket_of(make_module(), 10, 11))) != plain


def test_after_a_fit_that_prunes_it_knows_what_the_fit_ended_with(make_module, make_trainer, loaders):
    monitor = SparsityMonitor()
    make_trainer(callbacks=[GradualPruning(0.5, begin="2it"), monitor]).fit(make_module(), *loaders)
    assert monitor.densities == {"network.0.weight": 0.5, "network.4.weight": 0.5}
