// AVX-512: F, BW, VL, DQ and VBMI2, that is Ice Lake, Zen 4 and later.
#include <immintrin.h>

#include <utility>

#include "layer.h"

namespace sslc {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

struct F32 {
  static constexpr int kSize = 4, kStep = 16;
  static constexpr bool kNaturalOrder = true;
  static int64_t position(int64_t k) { return k; }
  static void expand(uint64_t mask, const uint8_t* p, Vec* w) {
    // From a register: the form that reads memory is microcoded on Zen.
    w[0] = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), _mm512_loadu_ps(p));
  }
  static void dense(const uint8_t* p, Vec* w) { w[0] = _mm512_loadu_ps(p); }
  static void dense(const uint8_t* p, int count, Vec* w) {
    w[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  }
  static const uint8_t* widen(const uint8_t* p, int64_t, float*) { return p; }
};

// 32 values become two vectors: the even columns (low halves, shifted up) and the odd ones (high halves, masked).
struct Bf16 {
  static constexpr int kSize = 2, kStep = 32;
  static constexpr bool kNaturalOrder = false;
  static int64_t position(int64_t k) { return (k & ~int64_t{31}) + (k & 1) * 16 + ((k & 31) >> 1); }
  static void split(__m512i v, Vec* w) {
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static void expand(uint64_t mask, const uint8_t* p, Vec* w) {
    split(_mm512_maskz_expand_epi16(static_cast<__mmask32>(mask), _mm512_loadu_si512(p)), w);
  }
  static void dense(const uint8_t* p, Vec* w) { split(_mm512_loadu_si512(p), w); }
  static void dense(const uint8_t* p, int count, Vec* w) {
    split(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p), w);
  }
  static const uint8_t* widen(const uint8_t* p, int64_t count, float* buffer) {
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t left = count - i;
      const __mmask16 mask = left < 16 ? static_cast<__mmask16>((1u << left) - 1) : __mmask16{0xffff};
      const __m512i v = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + 2 * i));
      _mm512_storeu_si512(buffer + i, _mm512_slli_epi32(v, 16));
    }
    return reinterpret_cast<const uint8_t*>(buffer);
  }
};

// 32 registers: few_rows(M) * M sums, one weight vector per row.
constexpr int kFewGroup = 8;
constexpr int few_rows(int M) { return M <= 6 ? 4 : 3; }

#include "kernels.inc"

}  // namespace

extern const Kernels kAvx512 = kernels_named("avx512", 16);

}  // namespace sslc
