"""The report's sections on where the engine comes from and where it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from validate.blocks import MISSING, Block, Table
from validate.verdict import Results


def build_blocks(build: Mapping[str, Any]) -> list[Block]:
    """The build record: its facts, then its files."""
    known = dict(build)
    files: Mapping[str, Any] = known.pop("files", {})
    facts = [(name.replace("_", " "), _fact(value)) for name, value in known.items() if not isinstance(value, Mapping)]
    for group, values in known.items():
        if isinstance(values, Mapping):
            facts.append((group.replace("_", " "), ", ".join(f"{name} {_fact(item)}" for name, item in values.items())))
    blocks: list[Block] = [Table(("", ""), facts)]
    if files:
        rows = [
            (name, f"{entry['bytes'] / 1e6:.2f}", entry["sha256"][:16] if "sha256" in entry else MISSING)
            for name, entry in files.items()
        ]
        blocks.append(Table(("file", "MB", "SHA-256 begins with"), rows, right=True))
    return blocks


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return MISSING if value is None else str(value)


def environment_table(results: Results) -> Table:
    """Machine, clocks, versions, and how long the validation took."""
    here = results.environment
    cores = ", ".join(str(core) for core in here.affinity)
    facts = {
        "machine": here.machine,
        "processor": f"{here.cpu}, {here.logical_cores} cores, of which this process may use {len(here.affinity)}",
        "affinity": f"cores {cores}",
        "GPUs": "; ".join(here.gpus) or "none that nvidia-smi knows",
        "memory": f"{here.memory_bytes / 2**30:.1f} GiB",
        "governor": here.governor or "cannot be read",
        "load average": ", ".join(f"{load:.2f}" for load in here.load_average),
        "versions": ", ".join(f"{name} {version}" for name, version in here.versions.items()),
        "build record": results.engine.build_record or MISSING,
    }
    if results.seconds:
        facts["validation took"] = ", ".join(f"{stage} {took:.0f} s" for stage, took in results.seconds.items())
    return Table(("", ""), facts.items())
