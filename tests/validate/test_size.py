import sys

import numpy as np
import pytest

from sslc_common.errors import InputError
from validate.size import Bytes, SizeLedger, file_bytes, measure_memory


def test_the_ratio_is_that_of_the_whole_engine():
    ledger = SizeLedger(engine=Bytes(1000, 700), layers=Bytes(800, 400))
    assert ledger.ratio == 0.7
    assert ledger.layers.ratio == 0.5


@pytest.mark.parametrize("both", [Bytes(), Bytes(dense=10), Bytes(compressed=10), Bytes(0, 10)])
def test_a_ratio_needs_both_sides(both):
    assert both.ratio is None


def test_files_are_counted_once_under_all_their_names(tmp_path):
    (tmp_path / "weights").write_bytes(b"x" * 100)
    (tmp_path / "graph").write_bytes(b"x" * 7)
    (tmp_path / "hard").hardlink_to(tmp_path / "weights")
    (tmp_path / "soft").symlink_to(tmp_path / "weights")
    assert file_bytes(tmp_path / name for name in ("weights", "graph", "hard", "soft")) == 107
    with pytest.raises(InputError, match="absent"):
        file_bytes([tmp_path / "absent"])


def test_memory_that_loading_takes_is_seen():
    size = 64 * 2**20
    loaded, grown = measure_memory(lambda: np.ones(size, np.uint8))
    assert loaded.nbytes == size
    # Pages of other things may come and go meanwhile: a few MiB.
    assert 0.8 * size < grown.resident < 1.5 * size
    assert grown.mapped is None or grown.mapped < 0.5 * size


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much of the memory is mapped files")
def test_mapped_files_are_told_apart(tmp_path):
    size = 64 * 2**20
    (tmp_path / "weights").write_bytes(b"x" * size)

    def load():
        mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
        mapped.sum()
        return mapped

    _, grown = measure_memory(load)
    assert 0.8 * size < grown.mapped <= 1.5 * size
    assert grown.resident >= grown.mapped * 0.8
