#!/bin/sh
# Makes the virtual environment, installs the dependencies and builds the native library. Called by make.
set -eu

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=${TORCH:-torch==2.13.0}

fail() {
    echo "error: $1" >&2
    exit 3
}

command -v "$PYTHON" >/dev/null 2>&1 ||
    fail "Python was not found; install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv), or pass PYTHON=/path/to/python."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" -V 2>&1); pass PYTHON=/path/to/python3.11."
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python's venv module is missing; install it (Debian, Ubuntu: apt install python3-venv)."
command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 ||
    fail "A C++17 compiler was not found; install one (Debian, Ubuntu: apt install g++), or set CXX."

say() { echo "setup: $1"; }

[ -x "$VENV/bin/python" ] || { say "virtual environment $VENV" && "$PYTHON" -m venv "$VENV"; }
pip="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"
if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    say "$TORCH"
    # Unquoted on purpose: TORCH may carry options such as --index-url.
    $pip $TORCH
fi
say "dependencies and native library"
$pip --constraint constraints.txt --editable ".[dev,tensorrt]"
touch "$VENV/.ready"
