// on_gpu CASE...: what emulate.cpp does on the CPU, done by a GPU: the same cases, the same choices of launch.h.
//   nvcc -std=c++17 -arch=native on_gpu.cu -o on_gpu
// Compiled, never run so far: no machine of this project has had a GPU.
#include "../src/launch.h"
#include "cases.h"

namespace {

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Device memory that is never freed: the program ends soon.
char* on_device(size_t bytes) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, bytes ? bytes : 16), "cudaMalloc");
  require(cudaMemset(memory, 0xFF, bytes), "cudaMemset");  // NaN in every type, as `poisoned`
  return static_cast<char*>(memory);
}

int run(const char* path, int most_shared) {
  const CaseFile c(path);
  if (!c.good) return 1;
  const Header& h = c.h;
  sslc::Layer layer;
  layer.parts = h.parts, layer.K = h.K, layer.layout = h.layout, layer.type = h.type;
  std::copy_n(h.N, 3, layer.out), std::copy_n(h.rank, 3, layer.rank);
  layer.int8 = h.int8 != 0, layer.slot = h.slot;
  char* in[5];
  for (int i = 0; i < 5; i++) {
    in[i] = on_device(h.bytes[i]);
    require(cudaMemcpy(in[i], c.in[i].get(), h.bytes[i], cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  char* const y = on_device(c.y_bytes());
  sslc::Buffers buffers{in[0], in[1], in[2], in[3], reinterpret_cast<const float*>(in[4]), {}, on_device(sslc::workspace_bytes(layer, h.M))};
  for (int i = 0; i < h.parts; i++) buffers.y[i] = y + c.y_bytes(i);
  const sslc::Device device{h.multiprocessors, std::min(h.shared_bytes, most_shared), h.splits};
  require(sslc::run_layer(layer, device, buffers, h.M, h.f32, nullptr), "run_layer");
  require(cudaDeviceSynchronize(), path);
  const auto out = poisoned(c.y_bytes());
  require(cudaMemcpy(out.get(), y, c.y_bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
  write_output(path, out.get(), c.y_bytes());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  int most_shared = 0, failed = 0;
  require(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "the GPU");
  for (int i = 1; i < argc; i++) failed |= run(argv[i], most_shared);
  return failed;
}
