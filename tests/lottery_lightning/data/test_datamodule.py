import lightning.pytorch as L
import pytest
import torch

from lottery_callbacks import ResumeCheckpoint, newest_checkpoint
from lottery_lightning.data import TensorDataModule
from lottery_lightning.data.datamodule import hold_out


class Numbered(TensorDataModule):
    """20 training, 5 validation and 7 test examples; the first feature is the number of the example."""

    loads = 0

    def load(self):
        self.loads += 1
        return {name: self.examples(size) for name, size in (("train", 20), ("val", 5), ("test", 7))}

    def examples(self, size):
        features = torch.randn(size, 6, generator=torch.Generator().manual_seed(size))
        features[:, 0] = torch.arange(size)
        return features, torch.arange(size) % 3


def ready(**arguments):
    data = Numbered(**{"batch_size": 6} | arguments)
    data.setup("fit")
    return data


def numbers(loader):
    return [int(number) for x, _ in loader for number in x[:, 0]]


class Seen(L.Callback):
    """The numbers of the examples that a fit trained on, step by step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append(batch[0][:, 0].int().tolist())


@pytest.fixture
def fit(make_module, make_trainer):
    def run(data, max_steps=8, checkpoint=None, **options):
        seen = Seen()
        options["callbacks"] = [seen, *options.pop("callbacks", [])]
        trainer = make_trainer(
            max_steps=max_steps, max_epochs=-1, val_check_interval=3, check_val_every_n_epoch=None, **options
        )
        trainer.fit(make_module(), data, ckpt_path=checkpoint)
        return seen.steps

    return run


def test_each_loader_serves_its_split():
    data = ready(eval_batch_size=3)
    assert sorted(numbers(data.train_dataloader())) == list(range(20))
    assert numbers(data.val_dataloader()) == list(range(5))
    assert numbers(data.test_dataloader()) == numbers(data.predict_dataloader()) == list(range(7))
    assert [len(y) for _, y in data.train_dataloader()] == [6, 6, 6, 2]
    assert [len(y) for _, y in data.test_dataloader()] == [3, 3, 1]


def test_the_set_is_read_once():
    data = ready()
    for stage in ("validate", "test", "fit"):
        data.setup(stage)
    assert data.loads == 1


def test_a_new_order_at_every_level_and_the_same_one_for_the_same_level():
    orders = []
    for level in (0, 1, 2, 0):
        data = ready()
        data.set_level(level)
        orders.append(tuple(numbers(data.train_dataloader())))
    assert len(set(orders)) == 3
    assert orders[3] == orders[0] == tuple(numbers(ready().train_dataloader()))


def test_repeat_gives_every_level_the_order_of_level_0():
    orders = set()
    for level in (0, 1, 7):
        data = ready(data_order="repeat")
        data.set_level(level)
        orders.add(tuple(numbers(data.train_dataloader())))
    assert orders == {tuple(numbers(ready().train_dataloader()))}


def test_the_data_seed_decides_the_order():
    assert numbers(ready(data_seed=1).train_dataloader()) != numbers(ready(data_seed=0).train_dataloader())
    assert numbers(ready(data_seed=1).train_dataloader()) == numbers(ready(data_seed=1).train_dataloader())


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"eval_batch_size": 0}, {"batch_size": -3}])
def test_batch_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="both must be positive"):
        Numbered(**sizes)


def test_an_unknown_data_order_is_refused():
    with pytest.raises(ValueError, match="data_order='repeated'"):
        Numbered(data_order="repeated")


def test_a_subclass_must_define_load():
    class Nothing(TensorDataModule):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing must define load\(\)"):
        Nothing().setup("fit")


def test_lightning_trains_every_example_once_an_epoch_in_the_order_of_the_loader(fit):
    steps = fit(Numbered(batch_size=6), max_steps=10)
    expected = ready().train_dataloader()
    assert [len(step) for step in steps] == [6, 6, 6, 2] * 2 + [6, 6]
    for epoch in range(2):
        expected.sampler.set_epoch(epoch)
        order = [number for step in steps[4 * epoch : 4 * epoch + 4] for number in step]
        assert sorted(order) == list(range(20))
        assert order == numbers(expected)


def test_a_fit_does_not_draw_its_order_from_the_global_random_state(fit):
    orders = []
    for seed in (1, 2):
        L.seed_everything(seed, verbose=False)
        orders.append(fit(Numbered(batch_size=6)))
    assert orders[0] == orders[1]


def test_a_fit_torn_in_the_midst_of_an_epoch_goes_on_with_the_next_batch(fit, tmp_path):
    def checkpoints():
        return [ResumeCheckpoint(tmp_path / "resume", seconds=0)]

    whole = fit(Numbered(batch_size=6), 12)
    torn = fit(Numbered(batch_size=6), 6, callbacks=checkpoints(), enable_checkpointing=True)
    resumed = fit(
        Numbered(batch_size=6),
        12,
        checkpoint=newest_checkpoint(tmp_path / "resume"),
        callbacks=checkpoints(),
        enable_checkpointing=True,
    )
    assert torn == whole[:6]
    assert resumed == whole[6:]


@pytest.mark.usefixtures("global_rng_untouched")
def test_hold_out_splits_into_disjoint_parts_by_its_seed_alone():
    images, labels = torch.arange(10.0), torch.arange(10)

    def split(seed):
        (rest, rest_labels), (held, held_labels) = hold_out(images, labels, 3, seed)
        assert rest.tolist() == rest_labels.tolist()
        assert held.tolist() == held_labels.tolist()
        return rest_labels.tolist(), held_labels.tolist()

    rest, held = split(0)
    assert (len(rest), len(held)) == (7, 3)
    assert sorted(rest + held) == list(range(10))
    assert split(0) == (rest, held)
    assert split(1) != (rest, held)


@pytest.mark.parametrize("held", [-1, 0, 10, 11])
def test_hold_out_leaves_both_parts_something(held):
    with pytest.raises(ValueError, match=rf"cannot hold out {held} of 10 examples for validation"):
        hold_out(torch.zeros(10), torch.zeros(10), held, 0)
