#!/bin/sh
# Everything that only a GPU can show, in one command:   sh scripts/gpu_check.sh MODEL [FOLDER [DENSE]]
#
# MODEL is a compressed folder (sslc-compress), FOLDER where the report goes (default: gpu-report), DENSE the dense model's
# folder, to be timed beside it. It sets up this checkout as `make` does; runs the kernels' tests on the GPU; builds and
# runs the compressed engine, compares it with PyTorch, times it, and writes FOLDER/report.json: the file to send back,
# with FOLDER/kernels.txt and kernels.json (their speed beside cuBLAS). Needs an NVIDIA GPU (compute capability 8.0 or later), its driver, and Linux x86_64. On H100,
# H200 and B200, which TensorRT-RTX does not know: .venv/bin/pip install tensorrt, and SSLC_TENSORRT=tensorrt.
set -eu
[ $# -ge 1 ] || { sed -n '2,8p' "$0"; exit 2; }
command -v nvidia-smi >/dev/null || { echo "nvidia-smi was not found: this check needs an NVIDIA GPU and its driver" >&2; exit 3; }
root=$(cd "$(dirname "$0")/.." && pwd)
out=${2:-gpu-report}
mkdir -p "$out"
nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total,clocks.max.sm --format=csv >"$out/gpu.csv"
make --no-print-directory -C "$root" setup plugin
python=$root/.venv/bin/python
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
    { echo "torch in $root/.venv sees no GPU: install a CUDA build of it there" >&2; exit 3; }
echo "kernels: every layout, type, tail and stack against float64, true sizes included"
(cd "$root" && SSLC_ON_GPU=1 "$python" -m pytest -q tests/plugins_trt/test_kernel.py tests/plugins_trt/test_plugin_life.py -m "slow or not slow") >"$out/kernels.txt" 2>&1 ||
    echo "kernels: FAILED, see $out/kernels.txt; the engine is tried all the same" >&2
"$python" "$root/scripts/bench_gpu.py" --json "$out/kernels.json" >"$out/kernel_speed.txt" 2>&1 || echo "the kernels were not timed: see $out/kernel_speed.txt" >&2
"$python" "$root/scripts/gpu_check.py" "$1" "$out" ${3:+--dense "$3"}
