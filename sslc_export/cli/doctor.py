"""sslc-doctor: what is here, what it enables, how to get what is missing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sslc_common.errors import MISSING, PASSED
from sslc_export import __version__
from sslc_export.cli.arguments import run

DESCRIPTION = """\
Looks which backends, libraries, compilers and devices are here, what each enables, and how to get what is missing.
Exit code 0 if engines for CPUs can be built and run here, 3 if something for that is missing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.parse_args(argv)
    return run(_doctor)


def _doctor() -> int:
    from sslc_export import console, doctor

    findings = list(doctor.examine())
    for finding in findings:
        state = "ok     " if finding.found else "missing"
        console.out(f"{state}  {finding.name:<13} {finding.found or f'{finding.get}, for {finding.enables}'}")
    console.out("")
    lacking = doctor.paths(findings)
    for path, missing in lacking.items():
        console.out(f"{path:<25} {'needs ' + ', '.join(missing) if missing else 'ready'}")
    return MISSING if lacking[doctor.CPU] else PASSED
