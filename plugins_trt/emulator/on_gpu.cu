// on_gpu CASE...: what emulate.cpp does on the CPU, done by a GPU: the same cases, the same choices of launch.h.
//   nvcc -std=c++17 -arch=native on_gpu.cu -o on_gpu
#include "../src/launch.h"
#include "cases.h"
#include "gpu.cuh"

namespace {

int run(const char* path, int most_shared, bool early) {
  const CaseFile c(path);
  if (!c.good) return 1;
  const Header& h = c.h;
  sslc::Layer layer;
  layer.parts = h.parts, layer.K = h.K, layer.layout = h.layout, layer.type = h.type;
  std::copy_n(h.N, 3, layer.out), std::copy_n(h.rank, 3, layer.rank);
  layer.int8 = h.int8 != 0, layer.slot = h.slot;
  void* in[5];
  for (int i = 0; i < 5; i++) in[i] = to_gpu(c.in[i].get(), h.bytes[i]);
  const auto out = poisoned(c.y_bytes());
  char* const y = static_cast<char*>(to_gpu(out.get(), c.y_bytes()));
  const size_t workspace_bytes = sslc::workspace_bytes(layer, h.M);
  void* const workspace = to_gpu(poisoned(workspace_bytes).get(), workspace_bytes);
  sslc::Buffers buffers{in[0], in[1], in[2], in[3], static_cast<const float*>(in[4]), {}, workspace};
  for (int i = 0; i < h.parts; i++) buffers.y[i] = y + c.y_bytes(i);
  const sslc::Device device{h.multiprocessors, std::min(h.shared_bytes, most_shared), h.splits, early};
  require(sslc::run_layer(layer, device, buffers, h.M, h.f32, nullptr), "run_layer");
  from_gpu(out.get(), y, c.y_bytes());
  write_output(path, out.get(), c.y_bytes());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  int most_shared = 0, major = 0, failed = 0;
  require(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "the GPU");
  require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "the GPU");
  for (int i = 1; i < argc; i++) failed |= run(argv[i], most_shared, major >= 9);
  return failed;
}
