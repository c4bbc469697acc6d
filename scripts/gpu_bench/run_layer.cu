// The kernels of plugins_trt/src behind C functions, for scripts/bench_gpu.py, which calls them on PyTorch's memory:
//   nvcc -std=c++17 -arch=native -shared -Xcompiler=-fPIC run_layer.cu -o librun_layer.so
#include "../../plugins_trt/src/launch.h"

namespace {

__global__ void read_all(const uint4* from, size_t count, unsigned* sink) {
  unsigned sum = 0;
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    const uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
    sum ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < count; i += step) sum ^= from[i].x;
  if (sum == 1) *sink = sum;  // never or seldom; but the compiler cannot know
}

// fields: parts, K, out[3], rank[3], layout, type, int8, slot.
sslc::Layer layer_of(const int32_t* fields) {
  sslc::Layer layer;
  layer.parts = fields[0], layer.K = fields[1];
  for (int i = 0; i < 3; i++) layer.out[i] = fields[2 + i], layer.rank[i] = fields[5 + i];
  layer.layout = fields[8], layer.type = fields[9], layer.int8 = fields[10] != 0, layer.slot = fields[11];
  return layer;
}

}  // namespace

extern "C" {

size_t layer_workspace(const int32_t* fields, int M) { return sslc::workspace_bytes(layer_of(fields), M); }

// y: the parts' outputs one after the other, in 16 bits. Returns a cudaError_t.
int layer_run(const int32_t* fields, const void* x, const void* S, const void* U, const void* V, const float* bias, void* y,
              void* workspace, int M, int multiprocessors, int shared_bytes, int early, void* stream) {
  const sslc::Layer layer = layer_of(fields);
  sslc::Buffers buffers{x, S, U, V, bias, {}, workspace};
  size_t before = 0;
  for (int i = 0; i < layer.parts; i++) {
    buffers.y[i] = static_cast<uint16_t*>(y) + before;
    before += static_cast<size_t>(M) * layer.out[i];
  }
  return sslc::run_layer(layer, {multiprocessors, shared_bytes, 0, early != 0}, buffers, M, false, static_cast<cudaStream_t>(stream));
}

int read_memory(const void* from, size_t bytes, void* sink, int blocks, void* stream) {
  read_all<<<blocks, 512, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(from), bytes / 16, static_cast<unsigned*>(sink));
  return cudaGetLastError();
}

int shared_bytes_of(int device) {
  int bytes = 0;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess ? bytes : 0;
}
}
