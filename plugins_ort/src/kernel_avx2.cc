// AVX2 with FMA, BMI and POPCNT, that is Haswell, Zen and later. There is no expand instruction: a table turns eight
// bits of the mask into a shuffle.
#include <immintrin.h>

#include <utility>

#include "layer.h"

namespace sslc {
namespace {

using Vec = __m256;
constexpr int kLanes = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec all(float value) { return _mm256_set1_ps(value); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline int count_bits(uint64_t word) { return __builtin_popcountll(word); }

using Lanes = __m256i;
inline Lanes load_lanes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Lanes all_lanes(const uint8_t* p) {
  int32_t lane;
  __builtin_memcpy(&lane, p, 4);
  return _mm256_set1_epi32(lane);
}
inline Vec as_floats(Lanes lanes) { return _mm256_castsi256_ps(lanes); }
inline Lanes no_lanes() { return _mm256_setzero_si256(); }
inline Vec to_floats(Lanes lanes) { return _mm256_cvtepi32_ps(lanes); }
inline Lanes low_halves(Lanes lanes) { return _mm256_srai_epi32(_mm256_slli_epi32(lanes, 16), 16); }
inline Lanes high_halves(Lanes lanes) { return _mm256_srai_epi32(lanes, 16); }
inline Lanes dot_int16(Lanes sums, Lanes a, Lanes b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

inline float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

struct Shuffles {
  alignas(32) int32_t f32[256][8];    // lane i takes value [i], or none where negative
  alignas(16) uint8_t bf16[256][16];  // byte i takes byte [i], or 0 where the top bit is set
  alignas(8) uint8_t int8[256][8];    // likewise
};

constexpr Shuffles make_shuffles() {
  Shuffles t{};
  for (int mask = 0; mask < 256; ++mask)
    for (int i = 0, next = 0; i < 8; ++i) {
      const bool stored = (mask >> i & 1) != 0;
      t.f32[mask][i] = stored ? next : INT32_MIN;
      t.int8[mask][i] = static_cast<uint8_t>(stored ? next : 0x80);
      t.bf16[mask][2 * i] = static_cast<uint8_t>(stored ? 2 * next : 0x80);
      t.bf16[mask][2 * i + 1] = static_cast<uint8_t>(stored ? 2 * next + 1 : 0x80);
      next += stored;
    }
  return t;
}

constexpr Shuffles kShuffles = make_shuffles();

// Lanes below `count` read memory.
inline __m256i lanes_below(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct F32 {
  static constexpr int kSize = 4, kStep = 8;
  static constexpr bool kNaturalOrder = true;
  static int64_t position(int64_t k) { return k; }
  static void expand(uint64_t mask, const uint8_t* p, Vec* w) {
    const __m256i take = _mm256_load_si256(reinterpret_cast<const __m256i*>(kShuffles.f32[mask & 255]));
    const Vec v = _mm256_permutevar8x32_ps(load(reinterpret_cast<const float*>(p)), take);
    w[0] = _mm256_blendv_ps(v, zero(), _mm256_castsi256_ps(take));
  }
  static void dense(const uint8_t* p, Vec* w) { w[0] = load(reinterpret_cast<const float*>(p)); }
  static void dense(const uint8_t* p, int count, Vec* w) {
    w[0] = _mm256_maskload_ps(reinterpret_cast<const float*>(p), lanes_below(count));
  }
  static Vec broadcast(const uint8_t* p) { return _mm256_set1_ps(load_f32(p)); }
  static constexpr int rows(int M) { return M == 2 ? 4 : 3; }
};

struct Bf16 {
  static constexpr int kSize = 2, kStep = 8;
  static constexpr bool kNaturalOrder = true;
  static int64_t position(int64_t k) { return k; }
  static Vec widened(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  static __m128i load8(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void expand(uint64_t mask, const uint8_t* p, Vec* w) {
    const __m128i take = _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.bf16[mask & 255]));
    w[0] = widened(_mm_shuffle_epi8(load8(p), take));
  }
  static void dense(const uint8_t* p, Vec* w) { w[0] = widened(load8(p)); }
  static void dense(const uint8_t* p, int count, Vec* w) {
    alignas(16) uint8_t whole[16] = {};
    __builtin_memcpy(whole, p, static_cast<size_t>(2 * count));
    dense(whole, w);
  }
  static Vec broadcast(const uint8_t* p) {
    int16_t bits;
    __builtin_memcpy(&bits, p, 2);
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi16(bits), high));
  }
  static constexpr int rows(int M) { return M == 2 ? 4 : 3; }
};

// 64 columns in 16 bits.
struct Integer {
  using Wide = __m256i;
  static constexpr int kParts = 4;
  static __m128i load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static __m128i expand8(uint64_t mask, const uint8_t* p) {
    return _mm_shuffle_epi8(load8(p), load8(kShuffles.int8[mask & 255]));
  }
  static void expand_bytes(uint64_t mask, const uint8_t* p, Wide* w) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const uint64_t before = part == 0 ? 0 : mask << (kBlock - 16 * part), here = mask >> (16 * part);
      const uint8_t* next = p + count_bits(before);
      const __m128i low = expand8(here, next), high = expand8(here >> 8, next + count_bits(here & 255));
      w[part] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(low, high));
    }
  }
  static Vec dot(const Wide* w, const int16_t* q) {
    const auto products = [&](int part) {
      return _mm256_madd_epi16(w[part], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 16 * part)));
    };
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_add_epi32(products(0), products(1)),
                                               _mm256_add_epi32(products(2), products(3))));
  }
  static constexpr int rows(int M) { return M == 2 ? 4 : 2; }
};

struct Int8 : Integer {
  static constexpr int kPerByte = 1;
  static void expand(uint64_t mask, const uint8_t* p, Wide* w) { expand_bytes(mask, p, w); }
};

struct Int4 : Integer {
  static constexpr int kPerByte = 2;
  static void expand(uint64_t mask, const uint8_t* p, Wide* w) {
    alignas(32) uint8_t bytes[kBlock];
    const __m256i signs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      // Each byte widened to 16 bits, its high half then moved to the upper byte: 32 numbers of four bits in order.
      const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * half));
      const __m256i pairs = _mm256_cvtepu8_epi16(packed);
      const __m256i codes =
          _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(0x0f));
      _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + 32 * half), _mm256_shuffle_epi8(signs, codes));
    }
    expand_bytes(mask, bytes, w);
  }
};

inline void widen_scales(const uint8_t* p, int count, float* out) { widen_halves(p, count, out); }

// 16 registers: rows(M) * M sums and a weight vector per row; kTileColumns / 8 sums and a weight.
constexpr int kFewGroup = 4;
constexpr int kTileColumns = 96;
constexpr int kChains = 1;
// A tile of tile_rows(V) rows and V vectors of tokens: as many sums, V activations, a pair of weights, a product.
constexpr int tile_rows(int vectors) { return vectors == 1 ? 8 : vectors == 2 ? 4 : 2; }

#include "kernels.inc"

}  // namespace

extern const Kernels kAvx2 = kernels_named("avx2", 16, 13);

}  // namespace sslc
