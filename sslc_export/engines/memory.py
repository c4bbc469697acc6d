"""Memory of an engine, measured in a process of its own so that nothing else is counted.

python -m sslc_export.engines.memory ENGINE THREADS     prints JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class EngineMemory:
    """What an engine takes, in bytes.

    Attributes:
        resident: Growth of the resident memory when it is opened and has run one token; mapped weights are counted.
        mapped: The part of it that is mapped files; None where the operating system does not say.
        kv_cache: Of one token of one sequence.
    """

    resident: int
    mapped: int | None
    kv_cache: int


def engine_memory(engine: Path, threads: int | None) -> EngineMemory:
    """Opens an .onnx engine in a fresh process, runs one token, and says what that took."""
    command = [sys.executable, "-m", __name__, str(engine), str(threads or 0)]
    return EngineMemory(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def _measure(engine: Path, threads: int | None) -> EngineMemory:
    import numpy as np

    from sslc_export.engines.onnxruntime import OnnxRuntimeEngine
    from validate.size import measure_memory

    def load() -> OnnxRuntimeEngine:
        opened = OnnxRuntimeEngine(engine, threads=threads)
        opened.run(np.zeros((1, 1), np.int64))
        return opened

    opened, grown = measure_memory(load)
    return EngineMemory(grown.resident, grown.mapped, opened.kv_cache_bytes)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(Path(sys.argv[1]), int(sys.argv[2]) or None))))
