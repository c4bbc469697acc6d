// For every processor that g++ and clang know: vectors are those of the compiler, and weights are spread one by one.
#include <utility>

#include "layer.h"

namespace sslc {
namespace {

typedef float Vec __attribute__((vector_size(16)));
constexpr int kLanes = 4;

inline Vec zero() { return Vec{}; }
inline Vec broadcast(float value) { return Vec{value, value, value, value}; }
inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

inline float widened(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

template <int Size>
inline float value_at(const uint8_t* p) {
  if (Size == 4) {
    float value;
    __builtin_memcpy(&value, p, 4);
    return value;
  }
  uint16_t half;
  __builtin_memcpy(&half, p, 2);
  return widened(half);
}

template <int Size>
struct Type {
  static constexpr int kSize = Size, kStep = 16;
  static constexpr bool kNaturalOrder = true;
  static int64_t position(int64_t k) { return k; }
  static void expand(uint64_t mask, const uint8_t* p, Vec* w) {
    float spread[kStep] = {};
    for (mask &= (1u << kStep) - 1; mask != 0; mask &= mask - 1, p += kSize)
      spread[__builtin_ctzll(mask)] = value_at<Size>(p);
    __builtin_memcpy(w, spread, sizeof spread);
  }
  static void dense(const uint8_t* p, int count, Vec* w) {
    float spread[kStep] = {};
    for (int i = 0; i < count; ++i) spread[i] = value_at<Size>(p + i * kSize);
    __builtin_memcpy(w, spread, sizeof spread);
  }
  static void dense(const uint8_t* p, Vec* w) { dense(p, kStep, w); }
  static const uint8_t* widen(const uint8_t* p, int64_t count, float* buffer) {
    if (Size == 4) return p;
    for (int64_t i = 0; i < count; ++i) buffer[i] = value_at<Size>(p + i * kSize);
    return reinterpret_cast<const uint8_t*>(buffer);
  }
};

using F32 = Type<4>;
using Bf16 = Type<2>;

constexpr int kFewGroup = 2;
constexpr int few_rows(int) { return 1; }

#include "kernels.inc"

}  // namespace

extern const Kernels kPortable = kernels_named("portable", 4);

}  // namespace sslc
