// emulate CASE...: runs the kernels on the CPU. Each output is written to CASE.out.
#include "../src/launch.h"
#include "cases.h"

namespace {

int run(const char* path) {
  const CaseFile c(path);
  if (!c.good) return 1;
  const Header& h = c.h;
  sslc::Layer layer;
  layer.parts = h.parts, layer.K = h.K, layer.layout = h.layout, layer.type = h.type;
  std::copy_n(h.N, 3, layer.out), std::copy_n(h.rank, 3, layer.rank);
  layer.int8 = h.int8 != 0, layer.slot = h.slot;
  const auto y = poisoned(c.y_bytes()), workspace = poisoned(sslc::workspace_bytes(layer, h.M));
  emulator::copies_land_late = h.late, emulator::reverse_order = h.reverse;
  sslc::Buffers buffers{c.in[0].get(), c.in[1].get(), c.in[2].get(), c.in[3].get(),
                        reinterpret_cast<const float*>(c.in[4].get()), {}, workspace.get()};
  for (int i = 0; i < h.parts; i++) buffers.y[i] = y.get() + c.y_bytes(i);
  const int error = sslc::run_layer(layer, {h.multiprocessors, h.shared_bytes, h.splits}, buffers, h.M, h.f32, nullptr);
  write_output(path, y.get(), c.y_bytes());
  return error;
}

}  // namespace

int main(int argc, char** argv) {
  int failed = 0;
  for (int i = 1; i < argc; i++) failed |= run(argv[i]);
  return failed;
}
