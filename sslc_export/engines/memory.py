"""Resident memory of an engine, measured in a process of its own so that nothing else is counted.

python -m sslc_export.engines.memory ENGINE THREADS     prints bytes
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def resident_bytes(engine: Path, threads: int | None) -> int:
    """Growth of the resident memory when an engine is opened and has run one token; mapped weights are counted."""
    command = [sys.executable, "-m", __name__, str(engine), str(threads or 0)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(engine: Path, threads: int | None) -> int:
    import numpy as np

    from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
    from validate.size import measure_memory

    def load() -> OnnxRuntimeEngine:
        opened = OnnxRuntimeEngine(engine, threads=threads)
        opened.run(np.zeros((1, 1), np.int64))
        return opened

    return measure_memory(load)[1]


if __name__ == "__main__":
    print(_measure(Path(sys.argv[1]), int(sys.argv[2]) or None))
