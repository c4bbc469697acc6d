"""The commands as processes: help, versions, exit codes, messages."""

import resource
import subprocess
import sys

import pytest

from sslc_export.doctor import BUILD, CPU, RUN, Finding, paths

COMMANDS = ["export", "compress", "validate", "doctor"]


def run(command, *arguments, **kwargs):
    code = f"import sys; from sslc_export.cli.{command} import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False, **kwargs
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_and_imports_nothing_heavy(command):
    code = (
        f"import sys; from sslc_export.cli.{command} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "exit code" in result.stdout.lower()
    assert "Undefined" not in result.stdout
    if command != "doctor":
        assert "examples:" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_in_half_a_second(command):
    # The least processor time of five, so that a busy machine does not fail it; 0.15 to 0.35 s are usual.
    seconds = []
    for _ in range(5):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(command, "--help").returncode == 0
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("export", [], "--model is missing"),
        ("export", ["--model", "nowhere/at/all", "--out", "e.onnx"], "There is no model nowhere/at/all"),
        ("export", ["--model", ".", "--out", "e.onnx"], "not a model folder"),
        ("export", ["--model", ".", "--out", "e.engine"], "suffix"),
        ("export", ["--model", "m", "--out", "e.onnx", "--budget", "abc"], "--budget has a value"),
        ("export", ["--model", "m", "--out", "e.onnx", "--bogus"], "unrecognized arguments: --bogus"),
        ("compress", ["--model", "nowhere", "--out", "o"], "There is no model nowhere"),
        ("validate", ["--engine", "nowhere.onnx"], "There is no engine nowhere.onnx"),
    ],
)
def test_a_mistake_gives_one_message_exit_code_2_and_leaves_nothing(tmp_path, command, arguments, message):
    result = run(command, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_what_each_path_lacks():
    found = Finding("CPU kernel", "here", "", "", (CPU,))
    findings = [found, Finding("plugin", None, "", "", (BUILD,)), Finding("CUDA device", None, "", "", (RUN,))]
    assert paths(findings) == {CPU: [], BUILD: ["plugin"], RUN: ["CUDA device"]}


def test_doctor_lists_the_cpu_path(tmp_path):
    result = run("doctor", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("onnxruntime", "CPU kernel", "CUDA device"):
        assert name in result.stdout
