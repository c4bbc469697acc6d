"""Work that is cut off: by Ctrl-C, by kill -9 at any moment, by a full disk."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compress
from compress import pipeline, shards, work
from compress.options import CompressOptions
from compress.pipeline import compress_model
from sslc_common.errors import InputError

HALF = CompressOptions(budget=0.5, rank_share=0.2)

# Compresses argv[1] to argv[2] and kills itself in the middle of writing file number argv[3].
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from compress import shards
from compress.options import CompressOptions
from compress.pipeline import compress_model

torch.set_num_threads(1)
save, count = shards.save_file, 0

def save_file(tensors, path, metadata):
    global count
    if count == int(sys.argv[3]):
        Path(path).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    save(tensors, path, metadata)

shards.save_file = save_file
tokens = torch.load(sys.argv[4])
compress_model(Path(sys.argv[1]), Path(sys.argv[2]), CompressOptions(budget=0.5, rank_share=0.2), tokens=tokens)
"""


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums are split among threads; the killed process and this one must split them alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same_model(one, other):
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names - {"compression_report.json"}:  # which has seconds
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def stop_at(block, error=KeyboardInterrupt):
    """A progress that raises when the given block begins."""

    def progress(iterable, description):
        for index, item in enumerate(iterable):
            if index == block and description == "Compressing blocks":
                raise error
            yield item

    return progress


@pytest.fixture
def whole(tmp_path, tiny_llama, tokens):
    out = tmp_path / "whole"
    compress_model(tiny_llama, out, HALF, tokens=tokens)
    return out


@pytest.mark.parametrize("written", [1, 5, 7, 8, 9, 10])
def test_a_killed_run_continues_to_the_same_bytes(tmp_path, tiny_llama, tokens, whole, written):
    """Files 0 to 3 are states between blocks, 4 to 6 their importance, 7 is that of layers, the others are blocks."""
    out = tmp_path / "out"
    torch.save(tokens, tmp_path / "tokens.pt")
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_llama), str(out), str(written), str(tmp_path / "tokens.pt")],
        cwd=Path(compress.__file__).parents[1],
        capture_output=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not out.exists()
    files = [path for path in (tmp_path / "out.partial").rglob("*") if path.is_file()]
    assert any("half a file" in path.read_text(errors="ignore") for path in files)
    report = compress_model(tiny_llama, out, HALF, tokens=tokens)
    assert report.resumed_blocks == max(written - 8, 0)
    same_model(out, whole)
    assert not (tmp_path / "out.partial").exists()


def test_plans_are_made_once(tmp_path, tiny_llama, tokens, monkeypatch):
    """An allocation that draws and runs the model need not come out the same on another number of threads."""
    options, out = CompressOptions(allocation="cap_reinforce", refinement=0), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress_model(tiny_llama, out, options, tokens=tokens, progress=stop_at(1))
    monkeypatch.setattr("compress.planning.allocate", lambda *_: pytest.fail("allocated again"))
    compress_model(tiny_llama, out, options, tokens=tokens)
    monkeypatch.undo()
    compress_model(tiny_llama, tmp_path / "whole", options, tokens=tokens)
    same_model(out, tmp_path / "whole")


@pytest.mark.parametrize("block", [0, 1, 2])
def test_ctrl_c_leaves_only_the_work_and_the_next_run_continues_it(tmp_path, tiny_llama, tokens, whole, block):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress_model(tiny_llama, out, HALF, tokens=tokens, progress=stop_at(block))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "tiny_llama", "whole"]
    assert not list((tmp_path / "out.partial").glob(".*"))
    report = compress_model(tiny_llama, out, HALF, tokens=tokens)
    assert report.resumed_blocks == block
    same_model(out, whole)


def test_interrupted_work_without_calibration_continues_too(tmp_path, tiny_llama):
    options = CompressOptions(method="magnitude")
    compress_model(tiny_llama, tmp_path / "whole", options)
    with pytest.raises(KeyboardInterrupt):
        compress_model(tiny_llama, tmp_path / "out", options, progress=stop_at(2))
    compress_model(tiny_llama, tmp_path / "out", options)
    same_model(tmp_path / "out", tmp_path / "whole")


def test_killed_between_publishing_and_tidying_up(tmp_path, tiny_llama, tokens, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(work.Work, "publish", lambda self, out: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress_model(tiny_llama, out, HALF, tokens=tokens)
    monkeypatch.undo()
    assert not out.exists()
    assert compress_model(tiny_llama, out, HALF, tokens=tokens).resumed_blocks == 3
    compress.load(out)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"method": "oats"}, "options.method"),
        ({"budget": 0.4}, "options.budget"),
        ({"values_dtype": "bf16"}, "options.values_dtype"),
        ({"seed": 5}, "options.seed"),
    ],
)
def test_work_begun_with_other_options_is_refused_naming_both(tmp_path, tiny_llama, tokens, change, key):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress_model(tiny_llama, out, HALF, tokens=tokens, progress=stop_at(1))
    other = CompressOptions(**{"budget": 0.5, "rank_share": 0.2} | change)
    with pytest.raises(InputError) as error:
        compress_model(tiny_llama, out, other, tokens=tokens)
    name = key.partition(".")[2]
    for words in (key, repr(getattr(HALF, name)), repr(change[name]), "out.partial"):
        assert words in str(error.value)
    begun_anew = compress_model(
        tiny_llama,
        out,
        CompressOptions(**{"budget": 0.5, "rank_share": 0.2, "overwrite": True} | change),
        tokens=tokens,
    )
    assert begun_anew.resumed_blocks == 0


def test_work_on_another_model_or_text_is_refused(tmp_path, tiny_llama, tokens):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress_model(tiny_llama, out, HALF, tokens=tokens, progress=stop_at(1))
    with pytest.raises(InputError, match="another calibration"):
        compress_model(tiny_llama, out, HALF, tokens=tokens.flip(0))
    data = bytearray((tiny_llama / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (tiny_llama / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(InputError, match="another source"):
        compress_model(tiny_llama, out, HALF, tokens=tokens)


def test_a_finished_block_that_was_damaged_since_is_refused(tmp_path, tiny_llama, tokens):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress_model(tiny_llama, out, HALF, tokens=tokens, progress=stop_at(2))
    shard = tmp_path / "out.partial" / "model-00001-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(InputError, match="SHA-256"):
        compress_model(tiny_llama, out, HALF, tokens=tokens)
    assert not out.exists()


def test_an_old_output_stays_until_the_new_one_is_whole(tmp_path, tiny_llama, tokens):
    out = tmp_path / "out"
    compress_model(tiny_llama, out, CompressOptions(method="magnitude"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    options = CompressOptions(budget=0.5, rank_share=0.2, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        compress_model(tiny_llama, out, options, tokens=tokens, progress=stop_at(2))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert compress_model(tiny_llama, out, options, tokens=tokens).resumed_blocks == 2


def test_too_little_space_is_told_before_any_work(tmp_path, tiny_llama, tokens, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="not enough space"):
        compress_model(tiny_llama, tmp_path / "out", HALF, tokens=tokens, progress=stop_at(0, AssertionError))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_the_users_error(tmp_path, tiny_llama, tokens, monkeypatch, number):
    save = shards.save_file

    def save_file(tensors, path, metadata):
        if "00002" in str(path):
            raise OSError(number, os.strerror(number))
        save(tensors, path, metadata)

    monkeypatch.setattr(shards, "save_file", save_file)
    with pytest.raises(InputError, match="disk is full"):
        compress_model(tiny_llama, tmp_path / "out", HALF, tokens=tokens)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert compress_model(tiny_llama, tmp_path / "out", HALF, tokens=tokens).resumed_blocks == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 kB, which needs the right to mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk, tiny_llama, tokens, monkeypatch):
    monkeypatch.setattr(pipeline, "require_space", lambda path, size: None)  # else it is told beforehand
    with pytest.raises(InputError, match="disk is full"):
        compress_model(tiny_llama, small_disk / "out", HALF, tokens=tokens)
    assert not (small_disk / "out").exists()


def test_a_really_full_disk_has_no_room_for_hidden_states(small_disk, tiny_llama, tokens, monkeypatch):
    """A mapped file that was not allocated would end the process with SIGBUS instead."""
    monkeypatch.setattr("compress.blocks.SPILL_BYTES", 0)
    monkeypatch.setattr(pipeline, "require_space", lambda path, size: None)
    with pytest.raises(InputError, match="disk is full"):
        compress_model(tiny_llama, small_disk / "out", HALF, tokens=tokens.repeat(8, 1))
    assert not (small_disk / "out").exists()
