import ast
import subprocess
import sys
from pathlib import Path

import compress

FOLDER = Path(compress.__file__).parent


def test_commands_can_import_the_options_without_waiting_for_torch():
    program = (
        "import sys, compress, compress.options, compress.report, compress.budget; "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=FOLDER.parent, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_compress_knows_neither_onnx_nor_the_rooms_beside_and_above_it():
    strangers = {
        "onnx",
        "onnxruntime",
        "onnx_ir",
        "onnxscript",
        "sslc_export",
        "validate",
        "plugins_ort",
        "plugins_trt",
    }
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not strangers & {name.partition(".")[0] for name in names}, path
