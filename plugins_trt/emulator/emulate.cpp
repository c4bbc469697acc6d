// emulate CASE...: runs the kernels on the CPU. Each file holds one layer, its packed weights and activations; the output is
// written to CASE.out. plugins_trt/emulator/__init__.py writes and reads these files.
//
// As a library (-shared) it offers the kernels by name to the CUDA runtime stand-in.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <vector>

#include "../src/launch.h"

namespace {

// The file: these words, then x, S, U, V, bias, each padded to 16 bytes.
struct Header {
  int32_t N, K, rank, layout, type, int8, slot, M, f32, multiprocessors, shared_bytes, splits, late, reverse;
  int32_t bytes[5];
};

// Exact sizes, so that the address sanitizer sees a read past any buffer. operator new aligns to 16, as a GPU needs it.
std::unique_ptr<char[]> read(std::ifstream& file, size_t bytes) {
  std::unique_ptr<char[]> data(new char[bytes]);
  file.read(data.get(), static_cast<std::streamsize>(bytes));
  file.ignore(static_cast<std::streamsize>((16 - bytes % 16) % 16));
  return data;
}

int run(const char* path) {
  std::ifstream file(path, std::ios::binary);
  Header h;
  file.read(reinterpret_cast<char*>(&h), sizeof h);
  file.ignore(16 - sizeof h % 16);
  if (!file) return std::fprintf(stderr, "%s: not a case\n", path), 1;
  std::unique_ptr<char[]> in[5];
  for (int i = 0; i < 5; i++) in[i] = read(file, h.bytes[i]);
  sslc::Layer layer;
  layer.N = h.N, layer.K = h.K, layer.rank = h.rank, layer.layout = h.layout, layer.type = h.type;
  layer.int8 = h.int8 != 0, layer.slot = h.slot;
  const size_t y_bytes = static_cast<size_t>(h.M) * h.N * (h.f32 ? 4 : 2);
  std::unique_ptr<char[]> y(new char[y_bytes]), workspace(new char[sslc::workspace_bytes(layer, h.M)]);
  std::fill_n(y.get(), y_bytes, static_cast<char>(0xFF));  // NaN in every type: an output that nobody wrote is seen
  std::fill_n(workspace.get(), sslc::workspace_bytes(layer, h.M), static_cast<char>(0xFF));
  emulator::copies_land_late = h.late, emulator::reverse_order = h.reverse;
  const sslc::Buffers buffers{in[0].get(), in[1].get(), in[2].get(), in[3].get(),
                              reinterpret_cast<const float*>(in[4].get()), y.get(), workspace.get()};
  const int error = sslc::run_layer(layer, {h.multiprocessors, h.shared_bytes, h.splits}, buffers, h.M, h.f32, nullptr);
  std::ofstream(std::string(path) + ".out", std::ios::binary).write(y.get(), static_cast<std::streamsize>(y_bytes));
  return error;
}

}  // namespace

int main(int argc, char** argv) {
  int failed = 0;
  for (int i = 1; i < argc; i++) failed |= run(argv[i]);
  return failed;
}
