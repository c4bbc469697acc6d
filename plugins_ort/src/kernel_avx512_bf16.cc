// AVX-512 with BF16 (Zen 4, Sapphire Rapids and later): many tokens times bfloat16 values.
#include <immintrin.h>

#include "layer.h"

namespace sslc {
namespace {

#include "avx512.inc"

#include "lanes.inc"

// bfloat16 values times activations rounded to bfloat16, added in float32.
struct Bf16Pairs {
  struct Product {
    using Sum = Vec;
    static constexpr bool kScaled = false;
    static constexpr int kColumns = 2;
    static constexpr int64_t kRowBytes = 2 * kBlock;
    static constexpr int kTokenRows = 0;
    static Sum start(const float* c, const uint8_t*) { return load(c); }
    static Sum dot(Sum sum, Lanes w, Lanes x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
    static void finish(Sum sum, const float*, const uint8_t*, float* c) { store(c, sum); }
  };
  using Number = int16_t;
  static constexpr int kLines = 2;

  struct Token {
    float scale;
    // To nearest, ties to even; every NaN becomes one that stays NaN.
    int16_t rounded(float x) const {
      uint32_t bits;
      __builtin_memcpy(&bits, &x, 4);
      const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      return static_cast<int16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
    }
  };
  static Token token(const float*, int64_t) { return {1}; }

  static int bytes(uint64_t mask) { return 2 * count_bits(mask); }
  static void expand(uint64_t mask, const uint8_t* p, uint8_t* w) {
    const uint8_t* rest = p + 2 * count_bits(mask & 0xffffffff);
    _mm512_storeu_si512(
        w, _mm512_mask_expand_epi16(fresh_zero(), static_cast<__mmask32>(mask), _mm512_loadu_si512(p)));
    _mm512_storeu_si512(
        w + 64, _mm512_mask_expand_epi16(fresh_zero(), static_cast<__mmask32>(mask >> 32), _mm512_loadu_si512(rest)));
  }

  static void project(const Layer& layer, int64_t first, int64_t rows, const uint8_t* x, int64_t columns, float* c) {
    alignas(64) uint8_t w[kLanePanel * Product::kRowBytes] = {};
    for (int64_t k = 0; k < layer.K; k += kBlock) {
      const int64_t bytes = 2 * (layer.K - k < kBlock ? layer.K - k : kBlock);
      for (int64_t i = 0; i < rows; ++i) {
        const uint8_t* row = layer.V + 2 * ((first + i) * layer.K + k);
        prefetch(row + 256);
        if (bytes == Product::kRowBytes) {
          __builtin_memcpy(w + i * Product::kRowBytes, row, Product::kRowBytes);
        } else {
          __builtin_memset(w + i * Product::kRowBytes, 0, Product::kRowBytes);
          __builtin_memcpy(w + i * Product::kRowBytes, row, static_cast<size_t>(bytes));
        }
      }
      add_block<Product>(round_up(rows, 16), w, x + 2 * k * columns, columns, nullptr, c);
    }
  }
};

}  // namespace

extern const LaneKernels kAvx512Bf16Pairs = lane_kernels_of<Bf16Pairs>(9);

}  // namespace sslc
