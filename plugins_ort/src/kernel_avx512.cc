// AVX-512: F, BW, VL, DQ, VBMI2 and VNNI, that is Ice Lake, Zen 4 and later.
#include <immintrin.h>

#include <utility>

#include "layer.h"

namespace sslc {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec all(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline int count_bits(uint64_t word) { return __builtin_popcountll(word); }
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

// On Zen 5 an expand instruction waits for the old value of its result register even where the mask zeroes it: 5 cycles
// instead of 1 when a register is used again. Hence the merge into a fresh zero; the empty asm statement keeps
// compilers from making the zeroing form of it again.
inline __m512i fresh_zero() {
  __m512i zero = _mm512_setzero_si512();
  asm("" : "+v"(zero));
  return zero;
}

struct F32 {
  static constexpr int kSize = 4, kStep = 16;
  static constexpr bool kNaturalOrder = true;
  static int64_t position(int64_t k) { return k; }
  static void expand(uint64_t mask, const uint8_t* p, Vec* w) {
    w[0] = _mm512_castsi512_ps(
        _mm512_mask_expand_epi32(fresh_zero(), static_cast<__mmask16>(mask), _mm512_loadu_si512(p)));
  }
  static void dense(const uint8_t* p, Vec* w) { w[0] = _mm512_loadu_ps(p); }
  static void dense(const uint8_t* p, int count, Vec* w) {
    w[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  }
  static Vec broadcast(const uint8_t* p) { return _mm512_set1_ps(load_f32(p)); }
  static constexpr int rows(int) { return 4; }
};

// 32 values become two vectors: the even columns (low halves, shifted up) and the odd ones (high halves, masked).
struct Bf16 {
  static constexpr int kSize = 2, kStep = 32;
  static constexpr bool kNaturalOrder = false;
  static int64_t position(int64_t k) { return (k & ~int64_t{31}) + (k & 1) * 16 + ((k & 31) >> 1); }
  static Vec odd(__m512i v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static void split(__m512i v, Vec* w) {
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    w[1] = odd(v);
  }
  static void expand(uint64_t mask, const uint8_t* p, Vec* w) {
    split(_mm512_mask_expand_epi16(fresh_zero(), static_cast<__mmask32>(mask), _mm512_loadu_si512(p)), w);
  }
  static void dense(const uint8_t* p, Vec* w) { split(_mm512_loadu_si512(p), w); }
  static void dense(const uint8_t* p, int count, Vec* w) {
    split(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p), w);
  }
  static Vec broadcast(const uint8_t* p) {
    int16_t bits;
    __builtin_memcpy(&bits, p, 2);
    return odd(_mm512_set1_epi16(bits));
  }
  static constexpr int rows(int) { return 4; }
};

struct Int8 {
  using Wide = __m512i;
  static constexpr int kParts = 2;
  static void expand(uint64_t mask, const uint8_t* p, Wide* w) {
    const __m512i v = _mm512_mask_expand_epi8(fresh_zero(), static_cast<__mmask64>(mask), _mm512_loadu_si512(p));
    w[0] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(v));
    w[1] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(v, 1));
  }
  // A lane adds four products, at most 2^24 in all, which float32 holds exactly.
  static Vec dot(const Wide* w, const int16_t* q) {
    const __m512i sums = _mm512_dpwssd_epi32(_mm512_setzero_si512(), w[0], _mm512_loadu_si512(q));
    return _mm512_cvtepi32_ps(_mm512_dpwssd_epi32(sums, w[1], _mm512_loadu_si512(q + 32)));
  }
  static void widen(const uint8_t* p, int count, float* scales) {
    _mm512_store_ps(scales, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p)));
  }
  static constexpr int rows(int) { return 4; }
};

// 32 registers: rows(M) * M sums and a weight vector per row; twice kTileColumns / 16 sums and two weights.
constexpr int kFewGroup = 6;
constexpr int kTileColumns = 128;
constexpr int kChains = 2;

#include "kernels.inc"

}  // namespace

extern const Kernels kAvx512 = kernels_named("avx512", 24);

}  // namespace sslc
