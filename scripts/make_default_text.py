"""Makes the text that comes with the package: what calibration and held-out perplexity use if the user gives none.

    python scripts/make_default_text.py

Excerpts from State of the Union speeches (public domain), 1790 to 2020: some speeches for calibration, others held out.
"""

from __future__ import annotations

from pathlib import Path

from fetch_demo import fetch

DATA = Path(__file__).parents[1] / "sslc_export" / "data"
LONGEST = 3000  # characters of one excerpt, so that many styles and centuries fit


def excerpts(text: str, size: int) -> str:
    """Takes evenly spaced runs of whole paragraphs, about `size` characters in all."""
    pieces = []
    for start in range(0, len(text) - LONGEST, len(text) * LONGEST // size):
        start = text.index("\n\n", start) + 2
        end = text.rfind("\n\n", start, start + LONGEST)
        if end > start:
            pieces.append(text[start:end])
    return "\n\n".join(pieces) + "\n"


def main() -> None:
    """Writes both files."""
    text = fetch() / "text"
    DATA.mkdir(exist_ok=True)
    for part, name, size in (("train", "calibration.txt", 240_000), ("heldout", "held_out.txt", 120_000)):
        (DATA / name).write_text(excerpts((text / f"speeches.{part}.txt").read_text(), size))


if __name__ == "__main__":
    main()
