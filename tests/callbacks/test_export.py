"""Tickets and trained checkpoints as plain dense networks: state dicts and ONNX files."""

import builtins

import pytest
import torch
from stranger import Lottery, Net, bits, half_masks, raw, seeded, ticket_of
from torch import nn

from lottery_callbacks import Ticket
from lottery_callbacks.export import export_onnx


class SmallConv(nn.Module):
    """Convolution, BatchNorm, dropout and Linear: what an optimiser would fuse, fold or leave out."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class Sequence(nn.Module):
    """Tied embedding, LSTM and attention, whose weights other exporters transpose, split and reorder."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.output = nn.Linear(8, 11, bias=False)
        self.output.weight = self.words.weight

    def forward(self, tokens):
        return self.output(self.block(self.lstm(self.words(tokens))[0]))


def test_the_state_dict_of_a_found_ticket_loads_into_the_bare_network(tmp_path):
    imp = Lottery(tmp_path, Net, rewind="3it", trainer={"max_steps": 5}).run(1).imp
    ticket = Ticket.load(imp.ticket_path(2))
    bare = Net().net
    bare.load_state_dict(ticket.for_submodule("net").state_dict(), strict=True)
    assert bits(bare) == bits(ticket.apply_(seeded(4, Net)).net)
    for name, mask in ticket.for_submodule("net").masks.items():
        assert not any(raw(bare.get_parameter(name)[~mask]))
        assert torch.equal(bare.get_parameter(name)[mask], ticket.rewind.tensors[f"net.{name}"][mask])


def test_the_state_dict_is_a_copy():
    ticket = ticket_of(seeded(1, Net))
    before = bits(ticket.rewind.tensors)
    for tensor in ticket.state_dict().values():
        tensor.zero_()
    assert bits(ticket.rewind.tensors) == before


def exported(network, example, path, **options):
    """(zeros by name, initialisers by name, output of onnxruntime for any inputs)."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    zeros = export_onnx(network, example, path, **options)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs):
        return torch.from_numpy(session.run(None, dict(zip(names, (i.numpy() for i in inputs), strict=True)))[0])

    arrays = {entry.name: torch.tensor(onnx.numpy_helper.to_array(entry)) for entry in model.graph.initializer}
    return zeros, arrays, run


def test_a_tickets_network_is_in_the_file_to_the_bit_and_computes_the_same(tmp_path):
    network = seeded(0, SmallConv)
    ticket = ticket_of(network)
    with torch.no_grad():
        network.body[1].running_mean.uniform_(-1, 1)
    ticket = Ticket(ticket.masks, ticket_of(network).rewind)
    ticket.apply_(network.train())
    network.body[1].eval()
    modes, before = [part.training for part in network.modules()], bits(network)
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "deep" / "network.onnx"
    zeros, arrays, run = exported(network, images[:1], path, dynamic_shapes=({0: "batch"},))
    assert [part.training for part in network.modules()] == modes
    assert bits(network) == before
    assert [entry.name for entry in path.parent.iterdir()] == ["network.onnx"]
    assert set(ticket.masks) == {"body.0.weight", "head.weight"}
    assert {name: zeros[name] for name in ticket.masks} == {n: int((~m).sum()) for n, m in ticket.masks.items()}
    state = {name: tensor for name, tensor in network.state_dict().items() if tensor.ndim}
    assert {name: raw(arrays[name]) for name in state} == {name: raw(tensor) for name, tensor in state.items()}
    torch.testing.assert_close(run(images), network.eval()(images).detach())


def test_a_trained_checkpoint_of_a_compiled_network_exports_under_plain_names(tmp_path):
    module = Lottery(tmp_path, Net, trainer={"max_steps": 6}).run(2).module
    ticket = Ticket.load(tmp_path / "tickets" / "level_02.safetensors")
    module.net = torch.compile(module.net, backend="eager")
    module.forward = module.net
    images = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    zeros, arrays, run = exported(module.net, images, tmp_path / "net.onnx")
    masks = ticket.for_submodule("net").masks
    assert {name: zeros[name] for name in masks} == {name: int((~mask).sum()) for name, mask in masks.items()}
    assert {"1.weight", "2.running_var", "5.bias"} <= set(arrays)
    assert not any("_orig_mod" in name for name in arrays)
    torch.testing.assert_close(run(images), module.eval().net(images).detach())


def test_recurrent_attention_and_tied_weights_keep_their_zeros_under_their_names(tmp_path):
    network = seeded(0, Sequence)
    masks = half_masks(network)
    Ticket(masks, ticket_of(network).rewind).apply_(network)
    tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    zeros, arrays, run = exported(network, [tokens], tmp_path / "sequence.onnx")
    tied = {"words.weight": "output.weight"}  # torch keeps the last of its names
    for name, mask in masks.items():
        assert zeros[tied.get(name, name)] == int((~mask).sum())
    assert network.state_dict().keys() - arrays.keys() == tied.keys()
    torch.testing.assert_close(run(tokens), network.eval()(tokens).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_onnx_the_extra_is_named_in_one_line(tmp_path, monkeypatch, missing):
    pytest.importorskip("onnx")
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(RuntimeError, match=rf"^{missing} is missing: pip install 'lottery-lightning\[export\]'$"):
        export_onnx(SmallConv(), torch.ones(1, 1, 8, 8), tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []
