import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
import compress.hf  # teaches transformers to load compressed folders
from compress import importance, sequential
from compress.blocks import GRAM_STRIP, BlockCall, collect_inputs, embed, run
from compress.calibration import hold_out
from compress.format import Checkpoint
from compress.layer import LowRankSparseLinear, keep_decoded
from compress.options import ALLOCATIONS, METHODS, TEXT_ALLOCATIONS, CompressOptions
from compress.pipeline import compress_model
from compress.source import Source
from sslc_common.errors import InputError
from tests.compress.models import FAMILIES, VOCABULARY, save_tiny

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
HALF = {"budget": 0.5, "rank_share": 0.2}
LINEARS = {"llama": 7, "qwen2": 7, "qwen3": 7, "mistral": 7, "opt": 6, "gpt2": 4}


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("values_dtype", list(DTYPES))
def test_the_reloaded_model_is_the_model_at_the_end_of_compression(tmp_path, tokens, monkeypatch, family, values_dtype):
    """Hidden states that calibration saw after the last block are, bit for bit, those of the reloaded model."""
    source, out, last = save_tiny(tmp_path / "source", family), tmp_path / "out", []
    original = sequential.run

    def watched(block, call, hidden):
        original(block, call, hidden)
        last[:] = [hidden.clone()]

    monkeypatch.setattr(sequential, "run", watched)
    # Bitmap and scales alone are a good third of the bytes of int4 values in layers as narrow as these.
    sizes = HALF if values_dtype != "int4" else {"budget": 0.9, "rank": 1}
    report = compress_model(source, out, CompressOptions(values_dtype=values_dtype, **sizes), tokens=tokens)
    model = compress.load(out)
    compressed = [module for module in model.modules() if isinstance(module, LowRankSparseLinear)]
    assert len(compressed) == len(report.layers) == 3 * LINEARS[family]
    assert all(layer.values.dtype == DTYPES[values_dtype] for layer in compressed)

    seen = []
    model.get_submodule(Source.open(source).blocks[-1]).register_forward_hook(lambda _, __, y: seen.append(y))
    ordered, _ = hold_out(tokens)
    before = logits(model, ordered)
    assert torch.equal(seen[0], last[0])

    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out), ordered), before)
    keep_decoded(model)
    assert torch.equal(logits(model, ordered), before)
    generated = model.generate(tokens[:1, :4], max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_run_one_by_one_are_the_model(tmp_path, tokens, family, dtype):
    """With dense weights, the block-by-block forward gives the hidden states of the whole model in float32."""
    folder = save_tiny(tmp_path / "source", family, dtype)
    source = Source.open(folder)
    with torch.no_grad():
        hidden, calls = embed(source, tokens, tmp_path / "spill")
        for name, call in zip(source.blocks, calls, strict=True):
            source.load_block(name)
            run(source.model.get_submodule(name), call, hidden)
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    model.get_submodule(source.blocks[-1]).register_forward_hook(lambda _, __, y: seen.append(y))
    logits(model, tokens)
    assert torch.equal(hidden, seen[0])
    assert not (tmp_path / "spill").exists()


def test_the_dense_model_is_not_run_where_importance_knows_its_states(tmp_path, tiny_llama, tokens, monkeypatch):
    source, states, ran = Source.open(tiny_llama), tmp_path / "states", []
    monkeypatch.setattr(
        sequential, "run", lambda block, call, hidden: (ran.append(len(hidden)), run(block, call, hidden))
    )
    with torch.no_grad():
        importance.measure(source, tokens[:3], states, seed=0)
        hidden, calls = embed(source, tokens, tmp_path / "spill")
        for name, call in zip(source.blocks, calls, strict=True):
            source.load_block(name)
            known = importance.load_state(states, name, importance.HIDDEN)
            sequential._run_dense(source.model.get_submodule(name), call, hidden, known)
            assert torch.equal(hidden[:3], known)
    assert ran == [len(tokens) - 3] * 3
    model, seen = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), []
    model.get_submodule(source.blocks[-1]).register_forward_hook(lambda _, __, y: seen.append(y))
    logits(model, tokens)
    assert torch.allclose(hidden, seen[0], atol=1e-5)


def test_hidden_states_may_lie_in_a_file(tmp_path, tiny_llama, tokens, monkeypatch):
    reports = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr("compress.blocks.SPILL_BYTES", limit)
        compress_model(tiny_llama, tmp_path / str(limit), CompressOptions(method="wanda"), tokens=tokens)
        reports.append((tmp_path / str(limit) / "model-00003-of-00004.safetensors").read_bytes())
    assert reports[0] == reports[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", str(1 << 30), "tiny_llama"]


def test_layers_with_one_input_share_its_gram_matrix(tiny_llama, tmp_path, tokens):
    source = Source.open(tiny_llama)
    with torch.no_grad():
        hidden, calls = embed(source, tokens, tmp_path / "spill")
        name = source.blocks[0]
        source.load_block(name)
        block = source.model.get_submodule(name)
        layers = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        before = hidden.clone()
        inputs = collect_inputs(block, layers, calls[0], hidden, 6, gram=True)
        normed = block.input_layernorm(hidden)
    assert torch.equal(hidden, before)
    q, k, v, o = (inputs[f"self_attn.{x}_proj"] for x in "qkvo")
    assert q is k is v
    assert q is not o
    assert inputs["mlp.gate_proj"] is inputs["mlp.up_proj"]
    assert torch.equal(q.held_out, normed[6:].flatten(0, 1))
    X = normed[:6].flatten(0, 1).double()
    assert torch.allclose(q.gram.double(), X.T @ X / len(X), atol=1e-5)


@pytest.mark.parametrize("method", ["hassle_free", "alps"])
@pytest.mark.parametrize("allocation", ["fisher", "uniform"])
@pytest.mark.parametrize(("values_dtype", "budget"), [("int8", 0.7), ("int4", 0.9)])
def test_quantized_values_keep_the_budget_with_their_scales(
    tmp_path, tiny_llama, tokens, method, allocation, values_dtype, budget
):
    out = tmp_path / "out"
    options = CompressOptions(method=method, allocation=allocation, values_dtype=values_dtype, budget=budget)
    report = compress_model(tiny_llama, out, options, tokens=tokens)
    checkpoint = Checkpoint.open(out)
    checkpoint.verify()
    for row in report.layers:
        if row.dense_reason:
            continue
        names = [f"{row.name}.{part}" for part in ("bitmap", "values", "scales", "U", "V")]
        assert row.bytes == sum(checkpoint.tensors[name].length for name in names)
        assert 0 < row.error < 1
    assert report.budget_in_bytes <= budget
    assert (
        report.budget_in_bytes > budget - 0.06
    )  # what int4 values do not waste though they could: half a nibble of 48


def test_rounding_with_a_rank_draws_the_same_numbers_in_every_run(tmp_path, tiny_llama, tokens):
    options, files = CompressOptions("oats", 0.9, values_dtype="int4", rank=1, refinement=0), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        compress_model(tiny_llama, tmp_path / str(seed), options, tokens=tokens)
        files.append((tmp_path / str(seed) / "model-00001-of-00004.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(("budget_in", "values_dtype"), [("bytes", "int8"), ("bytes", "f32"), ("params", "bf16")])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_keeps_the_budget_and_no_less(
    tmp_path, tiny_llama, tokens, allocation, values_dtype, budget_in
):
    options = CompressOptions(
        "svd_llm",
        budget=0.7,
        budget_in=budget_in,
        allocation=allocation,
        values_dtype=values_dtype,
        refinement=0,
        exclude=("*.1.mlp.up_proj",),
    )
    report = compress_model(tiny_llama, tmp_path / "out", options, tokens=tokens)
    compressed = [row for row in report.layers if not row.dense_reason]
    assert len(report.layers) - len(compressed) == 1
    if budget_in == "bytes":
        spent, whole = (sum(getattr(row, size) for row in compressed) for size in ("bytes", "dense_bytes"))
        assert 0 <= 0.7 * whole - spent < 4 * len(compressed)  # less than a value of each layer
    else:
        assert sum(row.parameters for row in compressed) == sum(int(0.7 * row.N * row.K) for row in compressed)
    assert not (tmp_path / "out" / "plans.json").exists()


@pytest.mark.parametrize("allocation", ["farms", "welore", "uniform", "fisher"])
def test_weights_alone_will_do_for_some_allocations(tmp_path, tiny_llama, allocation):
    options = CompressOptions("magnitude", allocation=allocation)
    report = compress_model(tiny_llama, tmp_path / "out", options)
    densities = {round(row.density, 3) for row in report.layers if (row.N, row.K) == (48, 48)}
    assert (len(densities) > 1) == (allocation in ("farms", "welore"))
    assert 0.49 < report.budget_in_bytes <= 0.5


@pytest.mark.parametrize("allocation", TEXT_ALLOCATIONS)
def test_the_other_allocations_ask_for_text(tmp_path, tiny_llama, allocation):
    with pytest.raises(InputError, match=f"{allocation} looks at calibration text.*uniform, farms or welore"):
        compress_model(tiny_llama, tmp_path / "out", CompressOptions("magnitude", allocation=allocation))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_whole_model_in_memory_is_of_any_family(tmp_path, tokens, family):
    options = CompressOptions(allocation="cap_reinforce", budget=0.6, refinement=0)
    report = compress_model(save_tiny(tmp_path / "source", family), tmp_path / "out", options, tokens=tokens)
    assert 0.59 < report.budget_in_bytes <= 0.6


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("allocation", ["fisher", "uniform"])
def test_every_method_keeps_the_budget_and_reports_what_is_stored(tmp_path, tiny_llama, tokens, method, allocation):
    out = tmp_path / "out"
    options = CompressOptions(method=method, allocation=allocation, **HALF)
    report = compress_model(tiny_llama, out, options, tokens=tokens)
    checkpoint = Checkpoint.open(out)
    checkpoint.verify()
    for row in report.layers:
        names = [f"{row.name}.{part}" for part in ("bitmap", "values", "U", "V")]
        assert row.bytes == sum(checkpoint.tensors[name].length for name in names)
        if allocation == "uniform":
            assert 0.49 * row.dense_bytes < row.bytes <= 0.5 * row.dense_bytes
            assert (row.rank > 0) == METHODS[method].low_rank
        assert 0 < row.error < 1
        assert row.seconds > 0
        assert checkpoint.layers[row.name].nnz == row.nnz
    assert 0.49 < report.budget_in_bytes <= 0.5
    assert any(row.rank for row in report.layers) == METHODS[method].low_rank
    assert (len({round(row.density, 1) for row in report.layers}) > 1) == (allocation == "fisher")
    assert not (out / "importance.safetensors").exists()
    assert report.checkpoint_bytes == sum(ref.length for ref in checkpoint.tensors.values()) < report.source_bytes
    assert report.held_out_tokens == 32
    assert report.calibration_tokens == 7 * 32
    written = json.loads((out / "compression_report.json").read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    assert written["budget_in_bytes"] == report.budget_in_bytes
    quantization = checkpoint.config["quantization_config"]
    assert (quantization["method"], quantization["budget"], quantization["format_version"]) == (method, 0.5, 1)
    assert AutoTokenizer.from_pretrained(out)("w3 w5")["input_ids"] == [3, 5]


def test_the_held_out_error_is_the_error_of_the_layers_output(tmp_path, tiny_llama, tokens):
    report = compress_model(tiny_llama, tmp_path / "out", CompressOptions(**HALF), tokens=tokens)
    name = "model.layers.0.self_attn.q_proj"
    dense, packed = (compress.load(folder).get_submodule(name) for folder in (tiny_llama, tmp_path / "out"))
    model = compress.load(tiny_llama)
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, tokens[-1:])  # the last sequence, the only one held out
    with torch.no_grad():
        expected = (dense(seen[0]) - packed(seen[0])).norm() / dense(seen[0]).norm()
    assert report.layers[0].name == name
    assert report.layers[0].error == pytest.approx(float(expected), rel=1e-4)


def test_calibration_text_is_tokenized_with_the_models_tokenizer(tmp_path, tiny_llama):
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 97}" for i in range(2000)))
    options = CompressOptions(
        method="wanda", calibration=(str(tmp_path / "text.txt"),), calibration_tokens=200, sequence_length=20
    )
    report = compress_model(tiny_llama, tmp_path / "out", options)
    assert report.calibration_tokens + report.held_out_tokens == 200


def test_magnitude_needs_no_text_and_the_others_say_that_they_do(tmp_path, tiny_llama):
    report = compress_model(tiny_llama, tmp_path / "out", CompressOptions(method="magnitude"))
    assert all(row.error is None for row in report.layers)
    assert report.calibration is None
    compress.load(tmp_path / "out")
    with pytest.raises(InputError, match="no calibration text"):
        compress_model(tiny_llama, tmp_path / "other", CompressOptions(method="wanda"))


def test_layers_may_stay_dense_and_say_why(tmp_path, tiny_llama, tokens):
    options = CompressOptions(exclude=("*.q_proj", "model.layers.1.mlp.*"), **HALF)
    report = compress_model(tiny_llama, tmp_path / "out", options, tokens=tokens)
    dense = {row.name: row for row in report.layers if row.dense_reason}
    assert len(dense) == 3 + 3
    assert dense["model.layers.0.self_attn.q_proj"].dense_reason == "excluded by *.q_proj"
    checkpoint = Checkpoint.open(tmp_path / "out")
    source = Checkpoint.open(tiny_llama)
    for name, row in dense.items():
        assert name not in checkpoint.layers
        assert torch.equal(checkpoint.read(f"{name}.weight"), source.read(f"{name}.weight"))
        assert row.bytes == row.dense_bytes
    assert set(checkpoint.config["quantization_config"]["dense_layers"]) == set(dense)
    assert type(compress.load(tmp_path / "out").get_submodule("model.layers.1.mlp.up_proj")) is torch.nn.Linear


@pytest.mark.parametrize("wrong", [{"exclude": ("*.qproj",)}, {"values_of": ("*.qproj=int8",)}], ids=str)
def test_a_pattern_that_matches_nothing_is_a_mistake(tmp_path, tiny_llama, tokens, wrong):
    with pytest.raises(InputError, match=r"matches none.*qproj"):
        compress_model(tiny_llama, tmp_path / "out", CompressOptions(**wrong), tokens=tokens)


@pytest.mark.parametrize("unit", ["bytes", "params"])
def test_layers_may_have_values_of_different_types_within_one_budget(tmp_path, tiny_llama, tokens, unit):
    of = ("*.0.mlp.down_proj=f32", "*.down_proj=int4", "*.mlp.*=int8")
    options = CompressOptions(values_dtype="bf16", values_of=of, budget=0.6, budget_in=unit)
    report = compress_model(tiny_llama, tmp_path / "out", options, tokens=tokens)
    layers = Checkpoint.open(tmp_path / "out").layers
    wanted = {"0.mlp.down_proj": "F32", "1.mlp.down_proj": "U8", "1.mlp.up_proj": "I8", "1.self_attn.q_proj": "BF16"}
    assert {name: layers[f"model.layers.{name}"].dtype for name in wanted} == wanted
    rows = {row.name: row for row in report.layers if not row.dense_reason}
    assert set(rows) == set(layers)
    assert len({layer.dtype for layer in layers.values()}) == 4
    for dtype in {layer.dtype for layer in layers.values()}:
        of_type = [rows[name] for name, layer in layers.items() if layer.dtype == dtype]
        if unit == "bytes":
            assert sum(row.bytes for row in of_type) <= 0.6 * sum(row.dense_bytes for row in of_type)
        else:
            size = sum(row.N * row.K for row in of_type)
            kept = sum(row.nnz + row.rank * (row.N + row.K) for row in of_type)
            assert 0.59 * size < kept <= 0.6 * size
    assert torch.isfinite(compress.load(tmp_path / "out")(tokens).logits).all()


@pytest.mark.parametrize("text", ["*.q_proj", "=int8", "*.q_proj=int3", "*.q_proj=int8,bf16"])
def test_a_type_of_values_without_layers_or_of_no_known_name_is_a_mistake(text):
    with pytest.raises(InputError, match="PATTERN=TYPE"):
        CompressOptions(values_of=(text,))


def test_a_full_budget_leaves_the_model_as_it_is(tmp_path, tiny_llama, tokens):
    report = compress_model(tiny_llama, tmp_path / "out", CompressOptions(budget=1.0), tokens=tokens)
    assert all("no fewer bytes" in row.dense_reason for row in report.layers)
    assert report.checkpoint_bytes == report.source_bytes
    assert torch.equal(logits(compress.load(tmp_path / "out"), tokens), logits(compress.load(tiny_llama), tokens))


def test_what_lies_outside_the_blocks_is_untouched(tmp_path, tokens):
    source = save_tiny(tmp_path / "source", "llama", torch.bfloat16)
    compress_model(source, tmp_path / "out", CompressOptions(refinement=0, **HALF), tokens=tokens)
    dense, compressed = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(dense.read(name), compressed.read(name))
    norm = "model.layers.2.input_layernorm.weight"
    assert torch.equal(dense.read(norm), compressed.read(norm))
    assert compress.load(tmp_path / "out").dtype == torch.bfloat16
    assert compress.load(tmp_path / "out", torch.float32).dtype == torch.float32


def test_biases_travel_with_their_layers(tmp_path, tokens):
    source = save_tiny(tmp_path / "source", "qwen2")
    compress_model(source, tmp_path / "out", CompressOptions(refinement=0, **HALF), tokens=tokens)
    dense, compressed = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    bias = "model.layers.1.self_attn.k_proj.bias"
    assert dense.read(bias).abs().sum() > 0
    assert torch.equal(dense.read(bias), compressed.read(bias))
    assert compressed.layers["model.layers.1.self_attn.k_proj"].bias == "F32"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_tied_embeddings_stay_tied(tmp_path, tokens, family):
    source = save_tiny(tmp_path / "source", family, tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint.open(source).tensors
    compress_model(source, tmp_path / "out", CompressOptions(**HALF), tokens=tokens)
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "out").tensors
    model = compress.load(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_weights_saved_without_the_head_have_shorter_names(tmp_path, tokens, family):
    """The original GPT-2 and OPT files on the hub are of this kind."""
    source = save_tiny(tmp_path / "source", family, tie_word_embeddings=True)
    prefix = {"gpt2": "transformer.", "opt": "model."}[family]
    tensors = load_file(source / "model.safetensors")
    compress_model(source, tmp_path / "long", CompressOptions(**HALF), tokens=tokens)
    save_file(
        {name.removeprefix(prefix): t for name, t in tensors.items()}, source / "model.safetensors", {"format": "pt"}
    )
    compress_model(source, tmp_path / "short", CompressOptions(**HALF), tokens=tokens)
    for path in (tmp_path / "long").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "short" / path.name).read_bytes()


def test_the_same_run_gives_the_same_bytes(tmp_path, tiny_llama, tokens):
    for name in ("one", "two"):
        compress_model(tiny_llama, tmp_path / name, CompressOptions(**HALF), tokens=tokens)
    for path in (tmp_path / "one").iterdir():
        if path.name != "compression_report.json":  # which has seconds
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_progress_goes_over_the_blocks(tmp_path, tiny_llama):
    seen = []

    def progress(iterable, description):
        items = list(iterable)
        seen.append((description, len(items)))
        return items

    compress_model(tiny_llama, tmp_path / "out", CompressOptions(method="magnitude"), progress=progress)
    assert seen == [("Checking weights", 30), ("Compressing blocks", 3)]


class TestBadInput:
    """Each is the user's error, and leaves nothing."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, tmp_path):
        yield
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    def fails(self, source, tmp_path, match, tokens=None, **options):
        with pytest.raises(InputError, match=match):
            compress_model(
                source, tmp_path / "out", CompressOptions(**{"method": "magnitude"} | options), tokens=tokens
            )

    def test_no_such_model(self, tmp_path):
        self.fails(tmp_path / "nothing", tmp_path, "no model folder")

    def test_no_config(self, tiny_llama, tmp_path):
        (tiny_llama / "config.json").unlink()
        self.fails(tiny_llama, tmp_path, "no config.json")

    def test_unsupported_architecture(self, tiny_llama, tmp_path):
        config = json.loads((tiny_llama / "config.json").read_text())
        (tiny_llama / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
        self.fails(tiny_llama, tmp_path, r"not supported.*'t5'.*llama")

    @pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "magic"}])
    def test_a_config_that_makes_no_model(self, tiny_llama, tmp_path, change):
        config = json.loads((tiny_llama / "config.json").read_text())
        (tiny_llama / "config.json").write_text(json.dumps(config | change))
        self.fails(tiny_llama, tmp_path, "does not describe a model")

    def test_a_config_of_another_size(self, tiny_llama, tmp_path):
        config = json.loads((tiny_llama / "config.json").read_text())
        (tiny_llama / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
        self.fails(tiny_llama, tmp_path, r"gate_proj.*contradicts config\.json")

    def test_truncated_weights(self, tiny_llama, tmp_path):
        path = tiny_llama / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.fails(tiny_llama, tmp_path, "cannot be read as safetensors")

    def test_a_missing_weight(self, tiny_llama, tmp_path):
        tensors = load_file(tiny_llama / "model.safetensors")
        del tensors["model.layers.2.mlp.down_proj.weight"]
        save_file(tensors, tiny_llama / "model.safetensors", {"format": "pt"})
        self.fails(tiny_llama, tmp_path, r"down_proj\.weight is missing")

    def test_an_untied_head_that_is_missing(self, tiny_llama, tmp_path):
        tensors = load_file(tiny_llama / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, tiny_llama / "model.safetensors", {"format": "pt"})
        self.fails(tiny_llama, tmp_path, r"lm_head\.weight is missing")

    @pytest.mark.parametrize(
        "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
    )
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, tiny_llama, tmp_path, tokens, name, value):
        tensors = load_file(tiny_llama / "model.safetensors")
        tensors[name][2, 3] = value
        save_file(tensors, tiny_llama / "model.safetensors", {"format": "pt"})
        self.fails(tiny_llama, tmp_path, rf"{name}.*NaN or infinite.*1 of", tokens=tokens, method="wanda")

    def test_a_compressed_source(self, compressed, tmp_path):
        self.fails(compressed, tmp_path, "compressed already")

    @pytest.mark.parametrize("text", ["", "w1 w2 w3 w4"])
    def test_too_little_text(self, tiny_llama, tmp_path, text):
        (tmp_path / "text.txt").write_text(text)
        self.fails(tiny_llama, tmp_path, "calibration text", method="wanda", calibration=(str(tmp_path / "text.txt"),))

    def test_sequences_longer_than_the_model_takes(self, tiny_llama, tmp_path):
        self.fails(tiny_llama, tmp_path, "at most 64", tokens=torch.zeros(4, 65, dtype=torch.int64))

    @pytest.mark.parametrize("token", [-1, VOCABULARY])
    def test_tokens_of_another_vocabulary(self, tiny_llama, tmp_path, token):
        self.fails(tiny_llama, tmp_path, "0 to 96", tokens=torch.full((4, 8), token))

    def test_a_single_sequence(self, tiny_llama, tmp_path):
        self.fails(tiny_llama, tmp_path, "too few", tokens=torch.zeros(1, 8, dtype=torch.int64))


def test_an_output_that_is_there_is_not_touched_unless_told(tmp_path, tiny_llama):
    out = tmp_path / "out"
    out.mkdir()
    compress_model(tiny_llama, out, CompressOptions(method="magnitude"))
    (out / "mine").touch()
    with pytest.raises(InputError, match="exists already"):
        compress_model(tiny_llama, out, CompressOptions(method="magnitude", budget=0.4))
    assert (out / "mine").exists()
    compress_model(tiny_llama, out, CompressOptions(method="magnitude", overwrite=True))
    assert not (out / "mine").exists()
    compress.load(out)


def test_what_was_done_before_is_not_done_again(tmp_path, tiny_llama, tokens, monkeypatch):
    options = CompressOptions(exclude=("*.q_proj",), **HALF)
    report = compress_model(tiny_llama, tmp_path / "out", options, tokens=tokens)
    monkeypatch.setattr("compress.pipeline.compress_blocks", None)  # may not be called
    assert compress_model(tiny_llama, tmp_path / "out", options, tokens=tokens) == report
    with pytest.raises(InputError, match="exists already"):
        compress_model(tiny_llama, tmp_path / "out", options, tokens=tokens.flip(1))
    for damaged in ("{}", "[]", '{"layers": 1}', json.dumps(report.to_json() | {"head": {"rank": 1}})):
        (tmp_path / "out" / "compression_report.json").write_text(damaged)
        with pytest.raises(InputError, match="exists already"):
            compress_model(tiny_llama, tmp_path / "out", options, tokens=tokens)


def test_the_source_is_never_overwritten(tiny_llama):
    with pytest.raises(InputError, match="output is the source"):
        compress_model(
            tiny_llama, tiny_llama / ".." / "tiny_llama", CompressOptions(method="magnitude", overwrite=True)
        )
    Checkpoint.open(tiny_llama)


def test_an_output_that_cannot_be_written(tmp_path, tiny_llama):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        compress_model(tiny_llama, tmp_path / "file" / "out", CompressOptions(method="magnitude"))


def test_links_in_the_source_are_followed(tmp_path, tiny_llama):
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in tiny_llama.iterdir():
        (linked / path.name).symlink_to(path)
    compress_model(linked, tmp_path / "out", CompressOptions(method="magnitude"))
    shutil.rmtree(tiny_llama)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    compress.load(tmp_path / "out")


@pytest.mark.parametrize("K", [1, GRAM_STRIP - 1, GRAM_STRIP, GRAM_STRIP + 1, 3 * GRAM_STRIP - 5])
def test_gram_matrices_are_whole_where_they_are_wider_than_a_strip(K):
    block = torch.nn.Sequential(torch.nn.Linear(K, 2))
    hidden = torch.randn(5, 7, K, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = collect_inputs(block, {"0": block[0]}, BlockCall((), {}), hidden, 4, gram=True)["0"]
    X = hidden[:4].reshape(-1, K).double()
    torch.testing.assert_close(found.gram.double(), X.T @ X / len(X), atol=1e-5, rtol=0)
    assert torch.equal(found.held_out, hidden[4])
