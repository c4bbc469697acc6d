// The files that tests/plugins_trt/emulator.py writes: one layer, its packed weights and activations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>

// The file: this header, then x, S, U, V, bias, each padded to 16 bytes.
struct Header {
  int32_t parts, N[3], rank[3], K, layout, type, int8, slot, M, f32, multiprocessors, shared_bytes, splits, late, reverse;
  int32_t bytes[5];
};

struct CaseFile {
  Header h;
  std::unique_ptr<char[]> in[5];  // of exactly their sizes, so that the address sanitizer sees a read past the end
  bool good = false;

  explicit CaseFile(const char* path) {
    std::ifstream file(path, std::ios::binary);
    file.read(reinterpret_cast<char*>(&h), sizeof h);
    file.ignore(16 - sizeof h % 16);
    for (int i = 0; i < 5 && file; i++) {
      in[i].reset(new char[h.bytes[i]]);  // operator new aligns to 16 bytes, as a GPU wants it
      file.read(in[i].get(), h.bytes[i]);
      file.ignore((16 - h.bytes[i] % 16) % 16);
    }
    good = static_cast<bool>(file);
    if (!good) std::fprintf(stderr, "%s: not a case\n", path);
  }

  // The outputs of the parts lie one after the other.
  size_t y_bytes(int parts) const {
    size_t bytes = 0;
    for (int i = 0; i < parts; i++) bytes += static_cast<size_t>(h.M) * h.N[i] * (h.f32 ? 4 : 2);
    return bytes;
  }
  size_t y_bytes() const { return y_bytes(h.parts); }
};

// Memory that reads as NaN in every type, so that an output which nobody wrote is seen.
inline std::unique_ptr<char[]> poisoned(size_t bytes) {
  std::unique_ptr<char[]> memory(new char[bytes]);
  std::fill_n(memory.get(), bytes, static_cast<char>(0xFF));
  return memory;
}

inline void write_output(const std::string& path, const char* data, size_t bytes) {
  std::ofstream(path + ".out", std::ios::binary).write(data, static_cast<std::streamsize>(bytes));
}
