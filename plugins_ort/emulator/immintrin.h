// The AVX-512 instructions that the kernels use, as plain loops, for tests: in place of the compiler's header of this
// name it lets the kernels' own source run on any processor, under sanitizers too (CMakeLists.txt, SSLC_EMULATE).
//
// Each function does what Intel's manual says of the intrinsic of its name (SDM volume 2; the pseudocode of the
// Intrinsics Guide). What a processor is strict about is strict here: a load reads all of its bytes, or with a mask those
// of its lanes and no other; an aligned store traps elsewhere; a product and its sum are rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef short __m512bh __attribute__((vector_size(64), may_alias));
typedef long long __m256i __attribute__((vector_size(32), may_alias));
typedef long long __m128i __attribute__((vector_size(16), may_alias));
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;
typedef uint64_t __mmask64;

// Calls, since the kernels' loops are unrolled: inlined, they take minutes to compile.
#define EMULATED inline __attribute__((noinline))

enum { _MM_HINT_T0, _MM_HINT_T1 };
inline void _mm_prefetch(const char*, int) {}  // any address may be prefetched

namespace emulated {

template <class T, int N>
struct Array {
  T at[N];
};

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline void must_be_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
}

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Every element of type T of a vector through `f`.
template <class T, class V, class F>
inline V map(V v, const F& f) {
  auto lanes = as<Array<T, sizeof(V) / sizeof(T)>>(v);
  for (T& lane : lanes.at) lane = static_cast<T>(f(lane));
  return as<V>(lanes);
}

// Every element widened from From to To.
template <class From, class To, class V>
EMULATED __m512i widened(V v) {
  const auto lanes = as<Array<From, sizeof(V) / sizeof(From)>>(v);
  Array<To, 64 / sizeof(To)> out;
  for (unsigned i = 0; i < 64 / sizeof(To); ++i) out.at[i] = lanes.at[i];
  return as<__m512i>(out);
}

template <class T, class V>
inline V all(T value) {
  Array<T, sizeof(V) / sizeof(T)> lanes;
  for (T& lane : lanes.at) lane = value;
  return as<V>(lanes);
}

template <class T, class V>
inline V masked_load(uint64_t mask, const void* p) {
  Array<T, sizeof(V) / sizeof(T)> lanes{};
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
    if ((mask >> i & 1) != 0) std::memcpy(&lanes.at[i], static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
  return as<V>(lanes);
}

template <class T>
EMULATED __m512i expand(__m512i otherwise, uint64_t mask, __m512i values) {
  auto lanes = as<Array<T, 64 / sizeof(T)>>(otherwise);
  const auto from = as<Array<T, 64 / sizeof(T)>>(values);
  for (unsigned i = 0, next = 0; i < 64 / sizeof(T); ++i)
    if ((mask >> i & 1) != 0) lanes.at[i] = from.at[next++];
  return as<__m512i>(lanes);
}

// float16 to float32, subnormal, infinite and NaN among them.
inline float of_half(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float size = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return (half >> 15) != 0 ? -size : size;
}

inline float of_bfloat16(uint16_t bits) { return as<float>(static_cast<uint32_t>(bits) << 16); }

// VDPBF16PS takes subnormal numbers, and returns them, as zero.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

}  // namespace emulated

// ---- floats ----

EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
EMULATED __m512 _mm512_set1_ps(float value) { return emulated::all<float, __m512>(value); }
EMULATED __m512 _mm512_loadu_ps(const void* p) { return emulated::load<__m512>(p); }
EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return emulated::masked_load<float, __m512>(mask, p);
}
EMULATED void _mm512_storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, sizeof v); }
EMULATED void _mm512_store_ps(void* p, __m512 v) {
  emulated::must_be_aligned(p);
  _mm512_storeu_ps(p, v);
}
EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
EMULATED __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
EMULATED __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}
// Halves are added to halves, as g++ and clang do it.
EMULATED float _mm512_reduce_add_ps(__m512 v) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}
EMULATED __m512 _mm512_castsi512_ps(__m512i v) { return emulated::as<__m512>(v); }
EMULATED __m512i _mm512_castps_si512(__m512 v) { return emulated::as<__m512i>(v); }
EMULATED __m512 _mm512_cvtepi32_ps(__m512i v) {
  const auto lanes = emulated::as<emulated::Array<int32_t, 16>>(v);
  __m512 out;
  for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(lanes.at[i]);
  return out;
}
EMULATED __m512 _mm512_cvtph_ps(__m256i v) {
  const auto lanes = emulated::as<emulated::Array<uint16_t, 16>>(v);
  __m512 out;
  for (int i = 0; i < 16; ++i) out[i] = emulated::of_half(lanes.at[i]);
  return out;
}
// The odd element's product first, then the even one's, each added with one rounding.
EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto x = emulated::as<emulated::Array<uint16_t, 32>>(a), y = emulated::as<emulated::Array<uint16_t, 32>>(b);
  for (int i = 0; i < 16; ++i)
    for (int j = 2 * i + 1; j >= 2 * i; --j)
      sum[i] = emulated::flushed(std::fma(emulated::flushed(emulated::of_bfloat16(x.at[j])),
                                          emulated::flushed(emulated::of_bfloat16(y.at[j])), emulated::flushed(sum[i])));
  return sum;
}

// ---- integers ----

EMULATED __m512i _mm512_setzero_si512() { return __m512i{}; }
EMULATED __m512i _mm512_set1_epi8(char value) { return emulated::all<char, __m512i>(value); }
EMULATED __m512i _mm512_set1_epi64(long long value) { return emulated::all<long long, __m512i>(value); }
EMULATED __m512i _mm512_set1_epi16(short value) { return emulated::all<short, __m512i>(value); }
EMULATED __m512i _mm512_set1_epi32(int value) { return emulated::all<int, __m512i>(value); }
EMULATED __m512i _mm512_loadu_si512(const void* p) { return emulated::load<__m512i>(p); }
EMULATED __m256i _mm256_loadu_si256(const __m256i* p) { return emulated::load<__m256i>(p); }
EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return emulated::masked_load<uint16_t, __m512i>(mask, p);
}
EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return emulated::masked_load<uint16_t, __m256i>(mask, p);
}
EMULATED void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof v); }
EMULATED __m512i _mm512_load_si512(const void* p) {
  emulated::must_be_aligned(p);
  return emulated::load<__m512i>(p);
}
EMULATED void _mm512_store_si512(void* p, __m512i v) {
  emulated::must_be_aligned(p);
  std::memcpy(p, &v, sizeof v);
}
EMULATED __m512i _mm512_add_epi8(__m512i a, __m512i b) {
  auto sums = emulated::as<emulated::Array<uint8_t, 64>>(a);
  const auto more = emulated::as<emulated::Array<uint8_t, 64>>(b);
  for (int i = 0; i < 64; ++i) sums.at[i] = static_cast<uint8_t>(sums.at[i] + more.at[i]);
  return emulated::as<__m512i>(sums);
}
EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  const auto lanes = emulated::as<emulated::Array<uint32_t, 16>>(b);
  int i = 0;
  return emulated::map<uint32_t>(a, [&](uint32_t lane) { return lane + lanes.at[i++]; });
}
EMULATED __m512i _mm512_srli_epi32(__m512i v, unsigned n) {
  return emulated::map<uint32_t>(v, [n](uint32_t lane) { return n > 31 ? 0 : lane >> n; });
}
EMULATED __m512i _mm512_sllv_epi32(__m512i v, __m512i counts) {
  const auto n = emulated::as<emulated::Array<uint32_t, 16>>(counts);
  int i = 0;
  return emulated::map<uint32_t>(v, [&](uint32_t lane) {
    const uint32_t by = n.at[i++];
    return by > 31 ? 0 : lane << by;
  });
}
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
EMULATED __m512i _mm512_slli_epi32(__m512i v, unsigned n) {
  return emulated::map<uint32_t>(v, [n](uint32_t lane) { return n > 31 ? 0 : lane << n; });
}
EMULATED __m512i _mm512_srai_epi32(__m512i v, unsigned n) {
  return emulated::map<int32_t>(v, [n](int32_t lane) { return lane >> (n > 31 ? 31 : n); });
}
EMULATED __m512i _mm512_cvtepi8_epi16(__m256i v) { return emulated::widened<int8_t, int16_t>(v); }
EMULATED __m512i _mm512_cvtepu32_epi64(__m256i v) { return emulated::widened<uint32_t, uint64_t>(v); }
EMULATED __m512i _mm512_multishift_epi64_epi8(__m512i from, __m512i v) {
  auto bytes = emulated::as<emulated::Array<uint8_t, 64>>(from);
  const auto words = emulated::as<emulated::Array<uint64_t, 8>>(v);
  for (int i = 0; i < 64; ++i) {
    const uint64_t word = words.at[i / 8];
    const int bit = bytes.at[i] & 63;
    bytes.at[i] = static_cast<uint8_t>(word >> bit | (bit > 0 ? word << (64 - bit) : 0));
  }
  return emulated::as<__m512i>(bytes);
}
EMULATED __m256i _mm512_extracti64x4_epi64(__m512i v, int half) {
  return emulated::load<__m256i>(reinterpret_cast<const char*>(&v) + half * 32);
}
EMULATED __m256i _mm512_castsi512_si256(__m512i v) { return _mm512_extracti64x4_epi64(v, 0); }
EMULATED __m512i _mm512_mask_expand_epi8(__m512i otherwise, __mmask64 mask, __m512i values) {
  return emulated::expand<uint8_t>(otherwise, mask, values);
}
EMULATED __m512i _mm512_mask_expand_epi16(__m512i otherwise, __mmask32 mask, __m512i values) {
  return emulated::expand<uint16_t>(otherwise, mask, values);
}
EMULATED __m512i _mm512_mask_expand_epi32(__m512i otherwise, __mmask16 mask, __m512i values) {
  return emulated::expand<uint32_t>(otherwise, mask, values);
}
EMULATED __m512i _mm512_maskz_compress_epi8(__mmask64 mask, __m512i values) {
  const auto from = emulated::as<emulated::Array<uint8_t, 64>>(values);
  emulated::Array<uint8_t, 64> to = {};
  for (int i = 0, next = 0; i < 64; ++i)
    if (mask >> i & 1) to.at[next++] = from.at[i];
  return emulated::as<__m512i>(to);
}
EMULATED __m128i _mm_loadu_si128(const __m128i* p) { return emulated::load<__m128i>(p); }
EMULATED __m512i _mm512_broadcast_i32x4(__m128i v) {
  emulated::Array<__m128i, 4> quarters;
  for (__m128i& quarter : quarters.at) quarter = v;
  return emulated::as<__m512i>(quarters);
}
// Quarters of the result, two bits of `which` for each, the lowest first: two of a, then two of b.
EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int which) {
  const auto x = emulated::as<emulated::Array<__m128i, 4>>(a), y = emulated::as<emulated::Array<__m128i, 4>>(b);
  emulated::Array<__m128i, 4> out;
  for (int i = 0; i < 4; ++i) out.at[i] = (i < 2 ? x : y).at[which >> (2 * i) & 3];
  return emulated::as<__m512i>(out);
}
// Elements of type T of a and b in turns, of the lower or the upper half of every quarter.
namespace emulated {
template <class T>
EMULATED __m512i unpacked(__m512i a, __m512i b, bool upper) {
  constexpr int kLanes = 64 / sizeof(T), kQuarter = kLanes / 4;
  const auto x = as<Array<T, kLanes>>(a), y = as<Array<T, kLanes>>(b);
  Array<T, kLanes> out;
  for (int i = 0; i < kLanes; ++i)
    out.at[i] = (i % 2 == 0 ? x : y).at[i / kQuarter * kQuarter + upper * kQuarter / 2 + i % kQuarter / 2];
  return as<__m512i>(out);
}
}  // namespace emulated
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return emulated::unpacked<uint32_t>(a, b, false); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return emulated::unpacked<uint32_t>(a, b, true); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return emulated::unpacked<uint64_t>(a, b, false); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return emulated::unpacked<uint64_t>(a, b, true); }
// The last argument is the lowest lane.
EMULATED __m512i _mm512_set_epi32(int p, int o, int n, int m, int l, int k, int j, int i, int h, int g, int f, int e,
                                  int d, int c, int b, int a) {
  const emulated::Array<int, 16> lanes = {{a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p}};
  return emulated::as<__m512i>(lanes);
}
EMULATED __m512 _mm512_permutexvar_ps(__m512i which, __m512 v) {
  const auto numbers = emulated::as<emulated::Array<uint32_t, 16>>(which);
  __m512 out;
  for (int i = 0; i < 16; ++i) out[i] = v[numbers.at[i] & 15];
  return out;
}
// Sums wrap around.
EMULATED __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
  auto lanes = emulated::as<emulated::Array<uint32_t, 16>>(sums);
  const auto x = emulated::as<emulated::Array<uint8_t, 64>>(a);
  const auto y = emulated::as<emulated::Array<int8_t, 64>>(b);
  for (int i = 0; i < 16; ++i)
    for (int j = 4 * i; j < 4 * i + 4; ++j) lanes.at[i] += static_cast<uint32_t>(int32_t{x.at[j]} * y.at[j]);
  return emulated::as<__m512i>(lanes);
}
EMULATED __m512i _mm512_dpwssd_epi32(__m512i sums, __m512i a, __m512i b) {
  auto lanes = emulated::as<emulated::Array<uint32_t, 16>>(sums);
  const auto x = emulated::as<emulated::Array<int16_t, 32>>(a), y = emulated::as<emulated::Array<int16_t, 32>>(b);
  for (int i = 0; i < 16; ++i)
    for (int j = 2 * i; j < 2 * i + 2; ++j) lanes.at[i] += static_cast<uint32_t>(int32_t{x.at[j]} * y.at[j]);
  return emulated::as<__m512i>(lanes);
}

// ---- tiles ----

namespace emulated {

// A thread's tiles, 16 rows of 64 bytes each. They may be used between loading a configuration and releasing it; what
// another shape than that would do is not needed here.
struct Tiles {
  bool shaped = false;
  uint8_t at[8][16][64];
};
inline thread_local Tiles tiles;

inline uint8_t (&tile(int number))[16][64] {
  if (!tiles.shaped) __builtin_trap();
  return tiles.at[number];
}

// sums[row][column] through `f(sum, a, b)` with 4 bytes of each, for all of a row of a and a column of b in order.
template <class T, class F>
inline void multiply_tiles(int sums, int a, int b, const F& f) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) {
      T sum;
      std::memcpy(&sum, tile(sums)[row] + 4 * column, 4);
      for (int k = 0; k < 16; ++k) sum = f(sum, tile(a)[row] + 4 * k, tile(b)[k] + 4 * column);
      std::memcpy(tile(sums)[row] + 4 * column, &sum, 4);
    }
}

inline float bfloat16_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return flushed(of_bfloat16(bits));
}

}  // namespace emulated

EMULATED void _tile_loadconfig(const void* p) {
  const auto shapes = emulated::load<emulated::Array<uint8_t, 64>>(p);
  bool usual = shapes.at[0] == 1 && shapes.at[1] == 0;
  for (int i = 0; i < 8; ++i) usual = usual && shapes.at[16 + 2 * i] == 64 && shapes.at[17 + 2 * i] == 0 && shapes.at[48 + i] == 16;
  if (!usual) __builtin_trap();
  std::memset(emulated::tiles.at, 0, sizeof emulated::tiles.at);
  emulated::tiles.shaped = true;
}
EMULATED void _tile_release() { emulated::tiles.shaped = false; }
EMULATED void _tile_zero(int number) { std::memset(emulated::tile(number), 0, 1024); }
EMULATED void _tile_loadd(int number, const void* base, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(emulated::tile(number)[i], static_cast<const char*>(base) + i * stride, 64);
}
EMULATED void _tile_stored(int number, void* base, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(base) + i * stride, emulated::tile(number)[i], 64);
}
EMULATED void _tile_dpbf16ps(int sums, int a, int b) {
  emulated::multiply_tiles<float>(sums, a, b, [](float sum, const uint8_t* x, const uint8_t* y) {
    for (int j = 0; j < 4; j += 2)
      sum = emulated::flushed(std::fma(emulated::bfloat16_at(x + j), emulated::bfloat16_at(y + j), emulated::flushed(sum)));
    return sum;
  });
}
EMULATED void _tile_dpbssd(int sums, int a, int b) {
  emulated::multiply_tiles<uint32_t>(sums, a, b, [](uint32_t sum, const uint8_t* x, const uint8_t* y) {
    for (int j = 0; j < 4; ++j) sum += static_cast<uint32_t>(static_cast<int8_t>(x[j]) * static_cast<int8_t>(y[j]));
    return sum;
  });
}
EMULATED void _tile_dpbsud(int sums, int a, int b) {
  emulated::multiply_tiles<uint32_t>(sums, a, b, [](uint32_t sum, const uint8_t* x, const uint8_t* y) {
    for (int j = 0; j < 4; ++j) sum += static_cast<uint32_t>(static_cast<int8_t>(x[j]) * y[j]);
    return sum;
  });
}
