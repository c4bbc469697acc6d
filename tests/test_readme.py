"""The README's commands, run as written, with a tiny model where the README has a real one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def fences(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder, text_file):
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny_folder, folder / "SmolLM2-135M")
    for name in ("wiki.txt", "other.txt"):
        shutil.copy(text_file, folder / name)
    return folder


def run(arguments, place, **kwargs):
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        arguments, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=300, **kwargs
    )


def test_the_readme_runs_as_written(place):
    commands = [line.removeprefix("$ ") for block in fences("console") for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        result = run(command, place, shell=True)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    programs = fences("python")
    assert len(programs) >= 2
    for program in programs:
        result = run([sys.executable, "-c", program], place)
        assert result.returncode == 0, f"{program}\n{result.stdout}\n{result.stderr}"


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
