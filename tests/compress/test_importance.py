import pytest
import torch
from transformers import AutoModelForCausalLM

from compress import importance
from compress.architectures import linear_shape, linears
from compress.source import Source
from tests.compress.models import FAMILIES, save_tiny


def by_autograd(folder, tokens, seed):
    """Squared gradients at the outputs of every layer of the whole model, with the same labels drawn."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator, seen, found = torch.Generator().manual_seed(seed), {}, {}
    blocks = Source.open(folder).blocks
    layers = {f"{b}.{name}": layer for b in blocks for name, layer in linears(model.get_submodule(b)).items()}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, y, name=name: seen.__setitem__(name, (args[0], y)))
    for sequence in tokens:
        logits = model(sequence[None]).logits[0]
        labels = importance.draw(logits.detach().softmax(-1), generator)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, [y for _, y in seen.values()])
        for (name, (x, _)), gradient in zip(seen.items(), gradients, strict=True):
            found.setdefault(name, []).append((x.detach().flatten(0, -2), gradient.flatten(0, -2).square()))
    return {name: tuple(torch.cat(parts) for parts in zip(*pairs, strict=True)) for name, pairs in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_is_the_backward_pass_of_the_whole_model(tmp_path, tokens, family, tied, dtype, monkeypatch):
    monkeypatch.setattr(importance, "HEAD_ROWS", 40)  # the last rows are fewer
    folder = save_tiny(tmp_path / "source", family, dtype, tie_word_embeddings=tied)
    source, states = Source.open(folder), tmp_path / "states"
    with torch.no_grad():
        found = importance.measure(source, tokens, states, seed=3)
    for name in source.blocks:
        F = importance.load_state(states, name, importance.FISHER)
        # A block's last layer writes straight to the hidden state after the block: one gradient for both.
        last = list(linears(source.model.get_submodule(name)))[-1]
        assert torch.allclose(F.diagonal(), found[f"{name}.{last}"].outputs, rtol=1e-4)
        assert torch.equal(F, F.T)
    expected = by_autograd(folder, tokens, seed=3)
    assert found.keys() == expected.keys()
    for name, (x, squares) in expected.items():
        outputs = squares.mean(0)
        # float32 sums in another order; entries near zero are sums of tiny squares.
        assert torch.allclose(found[name].outputs, outputs, rtol=1e-3, atol=1e-5 * float(outputs.max())), name
        inputs = x.square().mean(0)
        assert torch.allclose(found[name].inputs, inputs, rtol=1e-3, atol=1e-5 * float(inputs.max())), name
    assert importance.load_state(states, "another", importance.FISHER) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "states"]
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_labels_are_drawn_as_often_as_they_are_likely():
    generator = torch.Generator().manual_seed(0)
    likely = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = importance.draw(likely.expand(20000, -1), generator)
    often = torch.bincount(drawn, minlength=6) / len(drawn)
    assert (often[likely == 0] == 0).all()
    assert ((often - likely).abs() <= 4 * (likely * (1 - likely) / len(drawn)).sqrt()).all()
    assert importance.draw(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), generator).tolist() == [2, 0]


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_of_16_bits_is_multiplied_in_float32(bias, monkeypatch):
    monkeypatch.setattr(importance, "HEAD_ROWS", 5)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(13, 8).bfloat16()
    b, g = torch.randn(13).bfloat16() if bias else None, torch.randn(2, 3, 13)
    wide = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    y = importance._WideLinear.apply(x, weight, b)
    assert y.dtype == torch.float32
    assert torch.allclose(y.double(), wide, atol=1e-5)
    (got,), (expected,) = torch.autograd.grad(y, x, g), torch.autograd.grad(wide, x, g.double())
    assert torch.allclose(got, expected, atol=1e-5)


def test_states_may_lie_in_a_file(tmp_path, tiny_llama, tokens, monkeypatch):
    found = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr("compress.blocks.SPILL_BYTES", limit)
        source = Source.open(tiny_llama)
        with torch.no_grad():
            found.append(importance.measure(source, tokens, tmp_path / "states", seed=0))
        files = [path.stat().st_size for path in (tmp_path / "states").iterdir()]
        assert 0 < sum(files) - importance.state_bytes(source, tokens) < 512 * len(files)  # the headers
    for name in found[0]:
        assert torch.equal(found[0][name].outputs, found[1][name].outputs)


def test_what_is_saved_reads_back(tmp_path):
    kept = {
        "model.layers.0.q": importance.Importance(torch.rand(5), torch.rand(7)),
        "x": importance.Importance(torch.rand(3), torch.rand(2)),
    }
    importance.save(tmp_path / "i.safetensors", kept)
    again = importance.load(tmp_path / "i.safetensors")
    assert again.keys() == kept.keys()
    for name in kept:
        assert torch.equal(again[name].outputs, kept[name].outputs)
        assert torch.equal(again[name].inputs, kept[name].inputs)


def test_a_long_text_is_not_used_to_its_end(tmp_path, tiny_llama, tokens, monkeypatch):
    monkeypatch.setattr(importance, "TOKENS", 64)
    source = Source.open(tiny_llama)
    with torch.no_grad():
        long, short = (importance.measure(source, t, tmp_path / "states", seed=0) for t in (tokens, tokens[:2]))
    for name in long:
        assert torch.equal(long[name].outputs, short[name].outputs)
        assert long[name].outputs.shape == (linear_shape(source.model.get_submodule(name))[0],)
