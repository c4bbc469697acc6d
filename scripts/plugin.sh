#!/bin/sh
# Builds the TensorRT plugin for every supported GPU, beside plugins_trt/library.py. Called by make; no GPU is needed.
#
# The compiler (nvcc 13.0; cuobjdump for the tests) and TensorRT's headers come from PyPI into build/cuda, some 400 MB;
# nothing is installed on the machine or into the virtual environment. To build with a CUDA toolkit and a TensorRT SDK of
# your own instead, see plugins_trt/CMakeLists.txt.
set -eu

VENV=${VENV:-.venv}
CUDA=build/cuda
TOOLKIT=$CUDA/nvidia/cu13

if [ "$(uname -s) $(uname -m)" != "Linux x86_64" ]; then
    echo "error: The TensorRT plugin is built on Linux x86_64 only, this is $(uname -s) $(uname -m). See plugins_trt/CMakeLists.txt for other machines with a CUDA toolkit." >&2
    exit 3
fi

mkdir -p build
if [ ! -f "$CUDA/.ready" ]; then
    echo "setup: nvcc and TensorRT's headers"
    rm -rf "$CUDA"
    # Without dependencies: kernel-lens, which has a copy of TensorRT's headers, would bring half of CUDA and torch.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$CUDA" \
        nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-cccl==13.0.85 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37 kernel-lens==2.0.1
    # The names that nvcc and the linker look for; a toolkit has them, the wheels do not.
    ln -s lib "$TOOLKIT/lib64"
    ln -s libcudart.so.13 "$TOOLKIT/lib/libcudart.so"
    touch "$CUDA/.ready"
fi
echo "setup: TensorRT plugin"
cmake=$(command -v cmake || echo "$VENV/bin/cmake")
"$cmake" -S plugins_trt -B build/plugin -DCMAKE_CUDA_COMPILER="$PWD/$TOOLKIT/bin/nvcc" \
    -DTENSORRT_INCLUDE_DIR="$PWD/$CUDA/kernel_lens/include/tensorrt" >build/plugin.log
"$cmake" --build build/plugin >>build/plugin.log
"$cmake" --install build/plugin >>build/plugin.log
