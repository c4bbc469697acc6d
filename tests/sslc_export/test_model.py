import gguf
import numpy as np
import pytest

from sslc_common.errors import InputError
from sslc_export.model import resolve


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny_gguf(path):
    """A LLaMA of one block, 8 channels wide, with a vocabulary of bytes."""
    width, hidden, vocab = 32, 64, 261
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{i}>" for i in range(4)] + [chr(0x100 + i) for i in range(256)] + ["\u0100\u0101"])
    writer.add_token_types([3] * 4 + [1] * 257)
    writer.add_token_merges(["\u0100 \u0101"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (vocab, width),
        "output_norm": (width,),
        "output": (vocab, width),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (hidden, width),
        "blk.0.ffn_up": (hidden, width),
        "blk.0.ffn_down": (width, hidden),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_becomes_a_folder_once(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    folder = resolve(str(file))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(file)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("keep", [10, 2000, -10])
def test_a_gguf_that_is_cut_off(tmp_path, cache, keep):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="cannot be read as GGUF"):
        resolve(str(file))
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no model nowhere"), ("file.txt", r"a \.txt file"), ("empty", "no config.json in it")],
)
def test_what_is_not_a_model(tmp_path, name, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        resolve(name)


def test_a_hub_id_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="somebody/something"):
        resolve("somebody/something")
