"""Pictures of a report for the README: `python scripts/screenshots.py build/demo/report docs/images` (needs chromium).

By day and by night on a desk, and on a phone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Name, width and height in pixels, and whether by night.
_SHOTS = (("report-light", 1000, 1250, False), ("report-dark", 1000, 1250, True), ("report-phone", 390, 1250, False))
# Chromium makes no window narrower than 500 pixels, so the page is shown in a frame of its own.
_FRAME = (
    '<!doctype html><meta charset="utf-8"><style>body {{margin: 0}} iframe {{border: 0; display: block}}</style>'
    '<iframe src="{page}" width="{width}" height="{height}"></iframe>'
)
_LARGEST = 150_000  # bytes of a picture: a repository keeps all that it ever had


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="folder with report.html")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("error: there is no chromium; on Debian: apt-get install chromium", file=sys.stderr)
        return 3
    arguments.out.mkdir(parents=True, exist_ok=True)
    page = (arguments.report / "report.html").resolve(strict=True)
    for name, width, height, night in _SHOTS:
        picture = arguments.out / f"{name}.png"
        with tempfile.TemporaryDirectory() as folder:
            frame = Path(folder) / "frame.html"
            frame.write_text(_FRAME.format(page=page.as_uri(), width=width, height=height))
            options = ["--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
            options += ["--no-sandbox"]  # chromium refuses to start as root, as in containers, with it
            options += [f"--blink-settings=preferredColorScheme={0 if night else 1}", f"--window-size={width},{height}"]
            command = [browser, *options, f"--screenshot={picture.resolve()}", frame.as_uri()]
            subprocess.run(command, check=True, timeout=120, capture_output=True)
        size = picture.stat().st_size
        print(f"{picture}: {size / 1000:.0f} kB")
        if size > _LARGEST:
            print(f"error: more than {_LARGEST / 1000:.0f} kB", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
