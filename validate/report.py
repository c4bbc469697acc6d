"""The files of a verdict: verdict.json and junit.xml for machines, report.md and report.html for people."""

from __future__ import annotations

import json
from pathlib import Path

from sslc_common.files import atomic_path
from validate.blocks import Table
from validate.document import to_document
from validate.html import render_html
from validate.junit import render_junit
from validate.sections import sections
from validate.summary import headline
from validate.verdict import Verdict


def write_report(verdict: Verdict, folder: Path) -> tuple[Path, Path]:
    """Writes verdict.json, junit.xml, report.md and report.html into a folder, each whole or not at all.

    Returns:
        The paths of verdict.json and report.md.

    Raises:
        InputError: the folder cannot be written to.
    """
    contents = {
        "verdict.json": json.dumps(to_document(verdict), indent=2, allow_nan=False) + "\n",
        "junit.xml": render_junit(verdict),
        "report.md": render(verdict),
        "report.html": render_html(verdict),
    }
    for name, text in contents.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / "verdict.json", folder / "report.md"


def render(verdict: Verdict) -> str:
    """report.md as text."""
    parts = [f"# {headline(verdict)}"]
    for section in sections(verdict):
        if section.title:
            parts.append(f"## {section.title}")
        parts += [markdown_table(block) if isinstance(block, Table) else block for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A GitHub table."""
    rule = ["---", *["---:" if table.right else "---"] * (len(table.header) - 1)]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (table.header, rule, *cells))
