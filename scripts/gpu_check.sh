#!/bin/sh
# Everything that only a GPU can show, in one command:   sh scripts/gpu_check.sh MODEL [FOLDER]
#
# MODEL is a compressed folder (sslc-compress) and FOLDER where the report goes (default: gpu-report). It builds the plugin
# for this GPU, builds and runs the compressed engine, compares it with PyTorch, times it, and writes FOLDER/report.json:
# the file to send back. Needs an NVIDIA GPU (compute capability 8.0 or later), its driver, nvcc, cmake, TensorRT's
# headers (TENSORRT_INCLUDE_DIR), and in Python: this package, a CUDA build of torch, tensorrt-rtx-cu13 or tensorrt.
set -eu
[ $# -ge 1 ] || { sed -n '2,8p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
out=${2:-gpu-report}
mkdir -p "$out"
command -v nvidia-smi >/dev/null || { echo "nvidia-smi was not found: this check needs an NVIDIA GPU and its driver" >&2; exit 3; }
nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total,clocks.max.sm --format=csv >"$out/gpu.csv"
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
[ "$architecture" = 90 ] && architecture=90a
cmake -S "$root/plugins_trt" -B "$out/build" -DCMAKE_CUDA_ARCHITECTURES="$architecture-real" >"$out/build.log"
cmake --build "$out/build" >>"$out/build.log"
SSLC_TRT_LIBRARY="$out/build/libsslc_trt.so" PYTHONPATH="$root" python "$root/scripts/gpu_check.py" "$1" "$out"
