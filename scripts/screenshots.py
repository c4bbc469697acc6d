"""Pictures of a report for the README: `python scripts/screenshots.py build/report docs/images` (needs chromium)."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Name, width and height in pixels, and whether by night.
_SHOTS = (("report-light", 1000, 1100, False), ("report-dark", 1000, 1100, True), ("report-phone", 500, 1100, False))


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
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
        with tempfile.TemporaryDirectory() as profile:
            options = ["--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
            options += ["--no-sandbox"]  # chromium refuses to start as root, as in containers, with it
            options += [f"--blink-settings=preferredColorScheme={0 if night else 1}", f"--window-size={width},{height}"]
            picture = arguments.out / f"{name}.png"
            command = [browser, *options, f"--screenshot={picture.resolve()}", page.as_uri()]
            subprocess.run(command, check=True, timeout=120, capture_output=True)
            print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
