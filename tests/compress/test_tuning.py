import shutil

import pytest
import torch

import compress
from compress import pipeline, tuning
from compress.format import Checkpoint
from compress.layer import LowRankSparseLinear
from compress.options import CompressOptions
from compress.pipeline import compress_model
from compress.planning import plan_model, space_needed
from compress.source import Source
from compress.trainable import make_trainable
from compress.tuning import tune_folder
from sslc_common.errors import InputError
from tests.compress.models import save_tiny


def divergence(dense, compressed, tokens):
    with torch.no_grad():
        wanted, got = (compress.load(folder)(tokens).logits.log_softmax(-1) for folder in (dense, compressed))
    return float(torch.nn.functional.kl_div(got, wanted, reduction="batchmean", log_target=True))


def masks(folder):
    model = compress.load(folder)
    return {n: m.bitmap for n, m in model.named_modules() if isinstance(m, LowRankSparseLinear)}


@pytest.fixture
def steps(monkeypatch):
    """Tuning that stops after so many steps instead of minutes: the clock goes on by itself."""

    def set_steps(count):
        ticks = iter(range(10**9))
        monkeypatch.setattr(tuning.time, "monotonic", lambda: 60 * next(ticks) / (count + 1))

    return set_steps


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("values_dtype", ["f32", "bf16"])
def test_tuning_brings_the_model_nearer_to_the_dense_one_and_keeps_the_mask(
    tmp_path, tokens, family, values_dtype, steps
):
    # With weights as small as usual, predictions are nearly uniform and there is nothing to recover.
    source = save_tiny(tmp_path / "source", family, initializer_range=0.2)
    before, after = tmp_path / "before", tmp_path / "after"
    options = {"budget": 0.5, "rank_share": 0.2, "values_dtype": values_dtype}
    compress_model(source, before, CompressOptions(**options), tokens=tokens)
    steps(30)
    compress_model(source, after, CompressOptions(tuning_minutes=1, **options), tokens=tokens)
    Checkpoint.open(after).verify()
    assert divergence(source, after, tokens[:7]) < 0.9 * divergence(source, before, tokens[:7])
    kept, still = masks(before), masks(after)
    assert all(torch.equal(kept[name], still[name]) for name in kept)
    assert not (after / "tuned.safetensors").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "qwen3", "mistral"])
def test_the_gradient_is_that_of_the_divergence_however_many_logits_there_are_at_a_time(
    tmp_path, tokens, family, monkeypatch
):
    source = save_tiny(tmp_path / "source", family, initializer_range=0.2)
    compress_model(source, tmp_path / "out", CompressOptions(), tokens=tokens)
    dense, compressed = compress.load(source).double(), compress.load(tmp_path / "out")
    make_trainable(compressed)
    compressed.double()
    wanted, got = (model(tokens[:3]).logits.flatten(0, 1).log_softmax(-1) for model in (dense, compressed))
    divergence = torch.nn.functional.kl_div(got, wanted.detach(), reduction="batchmean", log_target=True)
    trained = [p for p in compressed.parameters() if p.requires_grad and p.numel()]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(divergence, trained)])
    monkeypatch.setattr(tuning, "LOGITS", 7 * dense.config.vocab_size)  # the last piece has fewer tokens
    tuning._backward(dense, compressed, tokens[:3])
    found = torch.cat([p.grad.flatten() for p in trained])
    assert (found - expected).norm() < 1e-5 * expected.norm()  # the divergence itself is in float32


def test_what_lies_outside_the_blocks_but_for_norms_is_untouched(tmp_path, tiny_llama, compressed, tokens, steps):
    before = Checkpoint.open(shutil.copytree(compressed, tmp_path / "before"))
    steps(3)
    tune_folder(compressed, tiny_llama, tokens, 1)
    after = Checkpoint.open(compressed)
    after.verify()
    for name in before.tensors:
        if not before.read(name).numel():  # U and V of rank 0
            continue
        same = torch.equal(before.read(name), after.read(name))
        assert same == name.endswith(("bitmap", "embed_tokens.weight", "lm_head.weight")), name


def test_the_factors_alone_can_be_tuned(tmp_path, tokens, steps):
    source = save_tiny(tmp_path / "source", "llama", initializer_range=0.2)
    before, after = tmp_path / "before", tmp_path / "after"
    compress_model(source, before, CompressOptions(rank_share=0.4), tokens=tokens)
    steps(30)
    compress_model(source, after, CompressOptions(rank_share=0.4, tuning_minutes=1, tuning_of="factors"), tokens=tokens)
    assert divergence(source, after, tokens[:7]) < 0.98 * divergence(source, before, tokens[:7])
    was, now = Checkpoint.open(before), Checkpoint.open(after)
    for name in was.tensors:
        assert torch.equal(was.read(name), now.read(name)) != name.endswith((".U", ".V")), name


def test_factors_that_are_not_there_cannot_be_tuned(tmp_path, tiny_llama, tokens):
    options = CompressOptions(rank_share=0.0, tuning_minutes=1, tuning_of="factors")
    with pytest.raises(InputError, match="no layer has a low-rank part"):
        compress_model(tiny_llama, tmp_path / "out", options, tokens=tokens)


def test_interrupted_while_the_shards_are_written_it_goes_on_with_the_same_numbers(
    tmp_path, tiny_llama, tokens, monkeypatch, steps
):
    options, out, write = CompressOptions(tuning_minutes=1), tmp_path / "out", tuning.write_shard
    steps(3)

    def stops(path, tensors):
        if "00002" in path.name:
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(tuning, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        compress_model(tiny_llama, out, options, tokens=tokens)
    shutil.copytree(tmp_path / "out.partial", tmp_path / "partial")
    monkeypatch.setattr(tuning, "write_shard", write)
    monkeypatch.setattr(tuning, "tune", None)  # may not be called
    report = compress_model(tiny_llama, out, options, tokens=tokens)
    assert report.tuning_steps == 3
    tuned = tuning.read_header(tmp_path / "partial" / "tuned.safetensors")
    del tuned["step"]
    checkpoint = Checkpoint.open(out)
    for name, ref in tuned.items():
        assert torch.equal(checkpoint.read(name), tuning.read_tensor(name, ref))


def test_interrupted_tuning_goes_on_where_it_was_saved(tmp_path, tiny_llama, compressed, tokens, monkeypatch, steps):
    straight, cut = (shutil.copytree(compressed, tmp_path / name) for name in ("straight", "cut"))
    monkeypatch.setattr(tuning, "SAVED_EVERY", 6)  # of 60 seconds
    steps(12)
    assert tune_folder(straight, tiny_llama, tokens, 1) == 12

    def stops(items, _):
        for index, item in enumerate(items):
            if index == 5:
                raise KeyboardInterrupt
            yield item

    steps(12)
    with pytest.raises(KeyboardInterrupt):
        tune_folder(cut, tiny_llama, tokens, 1, progress=stops)
    assert int(tuning.read_tensor("step", tuning.read_header(cut / "tuning.safetensors")["step"])) == 4
    steps(12)
    assert tune_folder(cut, tiny_llama, tokens, 1) == 12
    a, b = (tuning.read_header(folder / "tuned.safetensors") for folder in (straight, cut))
    assert all(torch.equal(tuning.read_tensor(n, a[n]), tuning.read_tensor(n, b[n])) for n in a)


def test_what_it_keeps_for_an_interruption_counts_in_the_space_that_is_needed(tmp_path, tiny_llama):
    plain = {"rank_share": 0.2, "method": "magnitude", "allocation": "uniform"}
    compress_model(tiny_llama, tmp_path / "out", CompressOptions(**plain))
    written = Checkpoint.open(tmp_path / "out").tensors
    parts = {part: sum(ref.length for name, ref in written.items() if name.endswith(f".{part}")) for part in "UV"}
    parts["values"] = sum(ref.length for name, ref in written.items() if name.endswith(".values"))

    def files(**tuning):
        source = Source.open(tiny_llama)
        with_it, without = CompressOptions(**plain, **tuning), CompressOptions(**plain)
        plans = plan_model(source, without)
        return space_needed(source, plans, with_it) - space_needed(source, plans, without)

    assert files(tuning_minutes=5) == sum(parts.values())
    assert files(tuning_minutes=6) == 6 * sum(parts.values())  # with moments, and all again while it is replaced
    assert files(tuning_minutes=5, tuning_of="factors") == parts["U"] + parts["V"]


def test_tuning_reads_on_in_the_calibration_text(tmp_path, tiny_llama, monkeypatch):
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 97}" for i in range(2000)))
    seen = []
    monkeypatch.setattr(pipeline, "tune_folder", lambda folder, source, tokens, *rest: seen.append(tokens))
    options = CompressOptions(
        calibration=(str(tmp_path / "text.txt"),), calibration_tokens=200, sequence_length=20, tuning_minutes=1
    )
    compress_model(tiny_llama, tmp_path / "out", options)
    assert seen[0].shape == (100, 20)
