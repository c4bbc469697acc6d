"""Strict reading: every way a folder can be damaged is an error that names the file and what to do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.format import Checkpoint
from compress.int4 import block_counts, pack_int4
from compress.layer import pack, unpack_mask
from compress.shards import checksum, read_header, write_shard
from sslc_common.errors import InputError
from tests.compress.models import save_tiny

BLOCK = "model-00001-of-00004.safetensors"
LAYER = "model.layers.0.mlp.up_proj"


def rejected(folder, *words):
    """Opening, verifying and loading all refuse the folder, with the given words and advice."""
    with pytest.raises(InputError) as error:
        Checkpoint.open(folder).verify()
    text = str(error.value)
    for word in words:
        assert word in text, text
    assert error.value.do, text
    with pytest.raises(InputError):
        compress.load(folder)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder, change, shard=BLOCK):
    """Changes tensors of a shard and writes it with right checksums: damage that was there from the beginning."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / shard).items()}
    change(tensors)
    write_shard(folder / shard, tensors)


def edit_header(path, change):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_a_whole_folder_is_read(compressed):
    checkpoint = Checkpoint.open(compressed)
    seen = []

    def progress(iterable, description):
        seen.append(description)
        return iterable

    checkpoint.verify(progress)
    assert seen == ["Verifying tensors"]
    info = checkpoint.layers[LAYER]
    assert (info.N, info.K, info.dtype, info.bias) == (80, 48, "F32", None)
    assert 0 < info.density < 1
    for name, ref in checkpoint.tensors.items():
        data = ref.file.read_bytes()[ref.offset : ref.offset + ref.length]
        tensor = checkpoint.read(name)
        assert bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) == data
        assert ref.shape == tuple(tensor.shape)


@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
def test_dense_folders_of_one_file_or_several_are_read(tmp_path, shard_size):
    folder = save_tiny(tmp_path / "dense", max_shard_size=shard_size)
    assert len(list(folder.glob("*.safetensors"))) == (1 if shard_size == "5GB" else 12)
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    assert checkpoint.layers == {}
    assert f"{LAYER}.weight" in checkpoint.tensors
    assert checkpoint.tensors[f"{LAYER}.weight"].sha256 is None


def test_the_same_tensors_make_the_same_bytes(tmp_path):
    tensors = {f"t{i}": torch.randn(3, i) for i in range(20)} | {"bf16": torch.randn(3).bfloat16()}
    written = set()
    for turn in range(4):
        write_shard(tmp_path / f"{turn}.safetensors", tensors)
        written.add((tmp_path / f"{turn}.safetensors").read_bytes())
    assert len(written) == 1
    for name, tensor in load_file(tmp_path / "0.safetensors").items():
        assert torch.equal(tensor, tensors[name])
        assert read_header(tmp_path / "0.safetensors")[name].sha256 == checksum(tensors[name])


def test_names_outside_ascii_survive(tmp_path):
    write_shard(tmp_path / "a.safetensors", {"größe": torch.ones(2), 'quote"\\': torch.ones(3)})
    assert {name: ref.shape for name, ref in read_header(tmp_path / "a.safetensors").items()} == {
        "größe": (2,),
        'quote"\\': (3,),
    }


@pytest.mark.parametrize("size", [0, 4, 7, 8, 100, -1, -1000])
def test_a_file_cut_off_anywhere(compressed, size):
    path = compressed / BLOCK
    path.write_bytes(path.read_bytes()[:size])
    rejected(compressed, BLOCK, "cannot be read as safetensors")


@pytest.mark.parametrize("size", [2**63, 2**40, 2**27, 10_000_000, 1, 0])
def test_an_absurd_header_size(compressed, size):
    path = compressed / BLOCK
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
    rejected(compressed, BLOCK, "cannot be read as safetensors")


def test_a_header_that_is_not_json(compressed):
    path = compressed / BLOCK
    data = bytearray(path.read_bytes())
    data[8:12] = b"oops"
    path.write_bytes(bytes(data))
    rejected(compressed, BLOCK, "cannot be read as safetensors")


@pytest.mark.parametrize("offsets", [[0, 2**60], [-4, 0], [4, 0], [0, 4], [2**63, 2**63 + 4]])
def test_offsets_that_overlap_or_leave_the_file(compressed, offsets):
    edit_header(compressed / BLOCK, lambda header: header[f"{LAYER}.U"].update(data_offsets=offsets))
    rejected(compressed, BLOCK, "cannot be read as safetensors")


@pytest.mark.parametrize("shape", [[2**40, 2**40], [80], [-80, 4], [2**62]])
def test_a_shape_that_does_not_fit_its_bytes(compressed, shape):
    edit_header(compressed / BLOCK, lambda header: header[f"{LAYER}.U"].update(shape=shape))
    rejected(compressed, BLOCK, "cannot be read as safetensors")


def test_an_unknown_dtype(compressed):
    edit_header(compressed / BLOCK, lambda header: header[f"{LAYER}.U"].update(dtype="F33"))
    rejected(compressed, BLOCK, "cannot be read as safetensors")


@pytest.mark.parametrize("part", ["values", "bitmap", "U", "V"])
def test_a_flipped_bit_in_a_tensor(compressed, part):
    ref = Checkpoint.open(compressed).tensors[f"{LAYER}.{part}"]
    data = bytearray((compressed / BLOCK).read_bytes())
    data[ref.offset + ref.length // 2] ^= 1
    (compressed / BLOCK).write_bytes(bytes(data))
    rejected(compressed, BLOCK, f"{LAYER}.{part}", "SHA-256")


def test_a_flipped_bit_outside_the_blocks(compressed):
    ref = Checkpoint.open(compressed).tensors["model.embed_tokens.weight"]
    data = bytearray(ref.file.read_bytes())
    data[ref.offset] ^= 128
    ref.file.write_bytes(bytes(data))
    rejected(compressed, ref.file.name, "embed_tokens", "SHA-256")


def test_missing_checksums(compressed):
    save_file(load_file(compressed / BLOCK), compressed / BLOCK, metadata={"format": "pt"})
    rejected(compressed, BLOCK, "no checksum")


def test_a_missing_shard(compressed):
    (compressed / BLOCK).unlink()
    rejected(compressed, BLOCK, "is missing")


def test_a_missing_tensor(compressed):
    edit_tensors(compressed, lambda tensors: tensors.pop(f"{LAYER}.U"))
    rejected(compressed, BLOCK, f"{LAYER}.U", "is missing")


def test_a_missing_entry_of_the_index(compressed):
    edit_json(compressed / "model.safetensors.index.json", lambda index: index["weight_map"].pop(f"{LAYER}.V"))
    rejected(compressed, BLOCK, f"{LAYER}.V", "does not say so")


def test_a_dense_parameter_that_is_missing(compressed):
    edit_json(compressed / "model.safetensors.index.json", lambda index: index["weight_map"].pop("model.norm.weight"))
    edit_tensors(compressed, lambda tensors: tensors.pop("model.norm.weight"), "model-00004-of-00004.safetensors")
    Checkpoint.open(compressed)  # which knows nothing of architectures
    with pytest.raises(InputError, match=r"missing keys.*norm"):
        compress.load(compressed)


@pytest.mark.parametrize("name", ["../" + BLOCK, "/etc/passwd", "", "..", 3, None])
def test_an_index_that_leads_out_of_the_folder(compressed, name):
    edit_json(
        compressed / "model.safetensors.index.json", lambda index: index["weight_map"].update({f"{LAYER}.V": name})
    )
    rejected(compressed, "index.json", "outside the folder")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "\x00", "[" * 100_000])
def test_an_index_that_is_none(compressed, content):
    (compressed / "model.safetensors.index.json").write_text(content)
    rejected(compressed, "model.safetensors.index.json")


@pytest.mark.parametrize("field", ["N", "K", "rank", "nnz"])
@pytest.mark.parametrize("value", [2**62, -1, 0, 7, "80", None, 1.5, True])
def test_sizes_in_the_config_that_are_not_those_of_the_tensors(compressed, field, value):
    def change(config):
        config["quantization_config"]["layers"][LAYER][field] = value

    edit_json(compressed / "config.json", change)
    rejected(compressed, LAYER)


def test_a_layer_that_the_architecture_does_not_have(compressed):
    def change(config):
        layers = config["quantization_config"]["layers"]
        layers["lm_head"] = layers[LAYER]

    edit_json(compressed / "config.json", change)
    rejected(compressed, "lm_head")


def test_layers_of_another_size_than_the_architecture(compressed):
    edit_json(compressed / "config.json", lambda config: config.update(intermediate_size=96))
    with pytest.raises(InputError, match="does not fit the architecture"):
        compress.load(compressed)


@pytest.mark.parametrize("bit", [0, 47])
def test_a_popcount_that_disagrees(compressed, bit):
    def change(tensors):
        tensors[f"{LAYER}.bitmap"][3, bit // 32] ^= 1 << (bit % 32)

    edit_tensors(compressed, change)
    rejected(compressed, BLOCK, f"{LAYER}.bitmap", "bits set")


def test_bits_in_the_padding(compressed):
    def change(tensors):
        # Row 3 loses its lowest stored column and gains one in the padding, so that the popcount stays right.
        words = tensors[f"{LAYER}.bitmap"][3]
        words[0] &= words[0] - 1
        words[1] |= 1 << 20

    edit_tensors(compressed, change)
    rejected(compressed, BLOCK, f"{LAYER}.bitmap", "padding after column 48", "row 3")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [f"{LAYER}.values", f"{LAYER}.U", "model.layers.0.input_layernorm.weight"])
def test_values_that_are_not_finite(compressed, value, name):
    edit_tensors(compressed, lambda tensors: tensors[name].view(-1).__setitem__(1, value))
    rejected(compressed, BLOCK, name, "NaN or infinite", "1 of")


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("bitmap", lambda t: t.to(torch.int64)),
        ("bitmap", lambda t: t[:, :1].contiguous()),
        ("values", lambda t: t[:-1]),
        ("values", lambda t: t.to(torch.float16)),
        ("U", lambda t: t.T.contiguous()),
        ("V", lambda t: t.to(torch.bfloat16)),
        ("bias", lambda t: torch.zeros(5)),
        ("bias", lambda t: torch.zeros(80, dtype=torch.int32)),
    ],
)
def test_tensors_of_a_wrong_shape_or_type(compressed, part, wrong):
    name = f"{LAYER}.{part}"
    edit_tensors(compressed, lambda tensors: tensors.update({name: wrong(tensors.get(name))}))
    edit_json(compressed / "model.safetensors.index.json", lambda index: index["weight_map"].update({name: BLOCK}))
    rejected(compressed, BLOCK, name)


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.0, True])
def test_an_unknown_format_version(compressed, version):
    edit_json(compressed / "config.json", lambda c: c["quantization_config"].update(format_version=version))
    rejected(compressed, "format version", "1")


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq"}, {}, "sslc", [1]])
def test_another_quantization(compressed, quantization):
    edit_json(compressed / "config.json", lambda config: config.update(quantization_config=quantization))
    rejected(compressed, "quantized in another way")


@pytest.mark.parametrize("layers", [None, [], "all"])
def test_a_config_without_layers(compressed, layers):
    edit_json(compressed / "config.json", lambda config: config["quantization_config"].update(layers=layers))
    rejected(compressed, "config.json", "layers")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\x00\x01", "[" * 100_000])
def test_a_config_that_is_no_json_object(compressed, content):
    (compressed / "config.json").write_text(content)
    rejected(compressed, "config.json", "not")


def test_a_folder_without_config(compressed):
    (compressed / "config.json").unlink()
    rejected(compressed, "no config.json")


def test_no_folder(tmp_path):
    rejected(tmp_path / "nothing", "no model folder", "Got: nothing")
    (tmp_path / "file").touch()
    rejected(tmp_path / "file", "no model folder", "Got: a file")


def test_only_pickled_weights(tiny_llama):
    (tiny_llama / "model.safetensors").rename(tiny_llama / "pytorch_model.bin")
    rejected(tiny_llama, "no safetensors", "pytorch_model.bin", "save_pretrained")


@pytest.mark.parametrize("model_type", ["bert", None, 3])
def test_an_unsupported_architecture(compressed, model_type):
    edit_json(compressed / "config.json", lambda config: config.update(model_type=model_type))
    with pytest.raises(InputError, match=r"not supported.*llama"):
        compress.load(compressed)


def test_transformers_itself_refuses_a_damaged_folder(compressed):
    """Without `compress.load`: the quantizer opens the folder before the weights are loaded."""
    from transformers import AutoModelForCausalLM

    import compress.hf  # noqa: F401

    edit_json(compressed / "config.json", lambda c: c["quantization_config"]["layers"][LAYER].update(nnz=2**62))
    with pytest.raises(InputError, match="contradicts"):
        AutoModelForCausalLM.from_pretrained(compressed)


def test_linked_files_are_followed(compressed, tmp_path):
    """The hub's cache is made of links."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in compressed.iterdir():
        (linked / path.name).symlink_to(path)
    Checkpoint.open(linked).verify()
    compress.load(linked)


def test_a_missing_tensor_is_the_readers_error_too(compressed):
    with pytest.raises(InputError, match=r"no\.such is missing"):
        Checkpoint.open(compressed).read("no.such")


def test_a_folder_is_read_from_anywhere(compressed, tmp_path):
    moved = shutil.move(compressed, tmp_path / "moved")
    Checkpoint.open(str(moved)).verify()


def as_quantized(tensors, bits=8):
    """Turns a layer into one with int8 or int4 values."""
    values = tensors[f"{LAYER}.values"].clamp(-1, 1).mul(2 ** (bits - 1) - 1).to(torch.int8)
    tensors[f"{LAYER}.values"] = pack_int4(tensors[f"{LAYER}.bitmap"], values) if bits == 4 else values
    shape = len(tensors[f"{LAYER}.U"]), tensors[f"{LAYER}.bitmap"].shape[1] // 2
    tensors[f"{LAYER}.scales"] = torch.full(shape, 0.01).half()
    for part in ("U", "V"):
        tensors[f"{LAYER}.{part}"] = tensors[f"{LAYER}.{part}"].bfloat16()


SCALES, VALUES, BITMAP = (f"{LAYER}.{part}" for part in ("scales", "values", "bitmap"))
SCALES_DAMAGE = {
    "none": (lambda t: t.pop(SCALES), ("scales is missing", "are int")),
    "another shape": (lambda t: t.update({SCALES: t[SCALES][:, :0].clone()}), ("scales is wrong", "F16")),
    "another type": (lambda t: t.update({SCALES: t[SCALES].float()}), ("scales is wrong", "F32")),
    "negative": (lambda t: t[SCALES][0].neg_(), ("negative scales", "0 or more")),
    "infinite": (lambda t: t[SCALES][0].fill_(float("inf")), ("NaN or infinite",)),
    "float factors": (lambda t: t.update({f"{LAYER}.U": t[f"{LAYER}.U"].float()}), ("another type", "BF16")),
}


def last_byte_of_an_odd_block(tensors):
    """Its place in the values."""
    counts = block_counts(tensors[BITMAP])
    odd = int((counts & 1).nonzero()[0])
    return int(((counts + 1) // 2)[: odd + 1].sum()) - 1


def set_padding(tensors):
    tensors[VALUES][last_byte_of_an_odd_block(tensors)] |= 0x80


def move_a_bit(tensors):
    """Moves an entry from one row to another where both are odd or both even: as many values, in another length."""
    mask = unpack_mask(tensors[BITMAP], tensors[f"{LAYER}.V"].shape[1])
    alike = (mask.sum(1) % 2 == mask[0].sum() % 2).nonzero()[:2, 0].tolist()
    mask[alike[0], int(mask[alike[0]].nonzero()[0])] = False
    mask[alike[1], int((~mask[alike[1]]).nonzero()[0])] = True
    tensors[BITMAP] = pack(mask, mask)[0]


INT4_DAMAGE = {
    "a byte too few for any mask": (lambda t: t.update({VALUES: t[VALUES][: len(t[VALUES]) // 2]}), ("contradicts",)),
    "more bytes than any mask": (lambda t: t.update({VALUES: t[VALUES].repeat(3)}), ("contradicts", "int4 values")),
    "two dimensions": (lambda t: t.update({VALUES: t[VALUES][None]}), ("contradicts config.json",)),
    "a byte too few for its bitmap": (lambda t: t.update({VALUES: t[VALUES][:-1].clone()}), ("bytes that its bitmap",)),
    "a byte too many for its bitmap": (
        lambda t: t.update({VALUES: torch.cat((t[VALUES], t[VALUES][:1]))}),
        ("bytes that its bitmap",),
    ),
    "another bitmap of as many": (move_a_bit, ("bytes that its bitmap",)),
    "padding that is not zero": (set_padding, ("padding of a block", "0 bits")),
}


def add_to_index(folder):
    edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({SCALES: BLOCK}))


@pytest.mark.parametrize(("bits", "dtype"), [(8, "I8"), (4, "U8")])
def test_quantized_values_with_scales_are_read(compressed, bits, dtype):
    nnz = Checkpoint.open(compressed).layers[LAYER].nnz
    edit_tensors(compressed, lambda tensors: as_quantized(tensors, bits))
    add_to_index(compressed)
    checkpoint = Checkpoint.open(compressed)
    checkpoint.verify()
    assert (checkpoint.layers[LAYER].dtype, checkpoint.layers[LAYER].nnz) == (dtype, nnz)
    assert compress.load(compressed).get_submodule(LAYER).values.shape == checkpoint.tensors[VALUES].shape


@pytest.mark.parametrize("damage", SCALES_DAMAGE)
@pytest.mark.parametrize("bits", [8, 4])
def test_scales_that_do_not_fit_their_values_are_refused(compressed, damage, bits):
    change, words = SCALES_DAMAGE[damage]
    edit_tensors(compressed, lambda tensors: (as_quantized(tensors, bits), change(tensors)))
    if damage != "none":
        add_to_index(compressed)
    rejected(compressed, *words)


def test_scales_of_floats_are_refused(compressed):
    edit_tensors(compressed, lambda t: (as_quantized(t), t.update({VALUES: t[VALUES].bfloat16()})))
    add_to_index(compressed)
    rejected(compressed, "not int8 or int4")


@pytest.mark.parametrize("damage", INT4_DAMAGE)
def test_int4_values_that_do_not_fit_their_bitmap_are_refused(compressed, damage):
    change, words = INT4_DAMAGE[damage]
    edit_tensors(compressed, lambda tensors: (as_quantized(tensors, 4), change(tensors)))
    add_to_index(compressed)
    rejected(compressed, *words)
