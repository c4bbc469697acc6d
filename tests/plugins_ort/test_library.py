from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from plugins_ort import library
from sslc_common.errors import InputError, MissingError


def test_the_library_is_found_beside_its_module_and_knows_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSLC_ORT_LIBRARY", raising=False)
    monkeypatch.delenv("SSLC_KERNEL", raising=False)
    assert library.library_path().parent == Path(library.__file__).parent
    assert library.kernel_name() in library.KERNELS


def test_another_place_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "other.so"
    shutil.copy(library.library_path(), copy)
    monkeypatch.setenv("SSLC_ORT_LIBRARY", str(copy))
    assert library.library_path() == copy


def test_an_absent_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSLC_ORT_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(MissingError, match=r"none.so.*Correct SSLC_ORT_LIBRARY, or unset it and build it with"):
        library.library_path()


def test_a_file_that_is_no_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("not a library")
    monkeypatch.setenv("SSLC_ORT_LIBRARY", str(path))
    with pytest.raises(MissingError, match=r"text.so cannot be loaded.*build it with"):
        library.library_path()


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "old.so"
    shutil.copy(library.library_path(), copy)
    monkeypatch.setenv("SSLC_ORT_LIBRARY", str(copy))
    monkeypatch.setattr(library, "_package_version", lambda: "99.0")
    with pytest.raises(MissingError, match=r"another version than this package.*Allowed: 99.0.*Build it with"):
        library.library_path()


def test_a_library_older_than_the_source_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "stale.so"
    shutil.copy(library.library_path(), copy)
    monkeypatch.setenv("SSLC_ORT_LIBRARY", str(copy))

    def declare(_: object) -> None:
        raise AttributeError("undefined symbol: sslc_new")

    monkeypatch.setattr(library, "_declare", declare)
    with pytest.raises(MissingError, match=r"older than this package.*sslc_new.*Build it with"):
        library.library_path()


@pytest.mark.parametrize("name", library.KERNELS)
def test_the_environment_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SSLC_KERNEL", name)
    try:
        found = library.kernel_name()
    except InputError as error:
        asked, can_run = str(error).split("this processor can run:")
        assert name != "portable"
        assert name in asked
        assert name not in can_run.split("Got:")[0]
    else:
        assert found == name


def test_an_unknown_kernel_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLC_KERNEL", "mmx")
    with pytest.raises(InputError, match=r"kernel 'mmx'; this processor can run: .*portable.*Unset SSLC_KERNEL"):
        library.library_path()
