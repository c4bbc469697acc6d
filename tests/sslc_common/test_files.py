import errno
import os

import pytest

from sslc_common.errors import InputError, MissingError, UserError
from sslc_common.files import atomic_path, require_space, writing


def test_an_error_reads_fact_got_allowed_do():
    error = InputError("Budget is out of range.", got=1.5, allowed="0 < budget ≤ 1", do="Pass --budget 0.5")
    assert str(error) == "Budget is out of range. Got: 1.5. Allowed: 0 < budget ≤ 1. Pass --budget 0.5."
    assert (InputError.exit_code, MissingError.exit_code, UserError.exit_code) == (2, 3, 2)


def test_a_file_appears_only_when_whole(tmp_path):
    target = tmp_path / "new" / "report.json"
    with atomic_path(target) as temporary:
        temporary.write_text("{}")
        assert not target.exists()
    assert target.read_text() == "{}"
    assert os.listdir(target.parent) == ["report.json"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_block_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    target = tmp_path / "model"
    target.write_text("old")
    with pytest.raises(failure), atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("x")
        raise failure
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_replaces_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").touch()
    with atomic_path(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "fresh").touch()
    assert os.listdir(tmp_path / "out") == ["fresh"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), RuntimeError('kind: StorageFull, "x"')])
def test_a_full_disk_is_the_users_error(tmp_path, error):
    with pytest.raises(InputError, match="disk is full"), writing(tmp_path / "x"):
        raise error


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), atomic_path(tmp_path / "file" / "below") as temporary:
        temporary.touch()


def test_a_bug_stays_a_bug(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError


def test_space_is_asked_for_beforehand(tmp_path):
    require_space(tmp_path / "a" / "b", 1)
    with pytest.raises(InputError, match="not enough space"):
        require_space(tmp_path / "a", 1 << 60)
