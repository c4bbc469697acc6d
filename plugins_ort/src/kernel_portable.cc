// For every processor that g++ and clang know: vectors are those of the compiler, and weights are spread one by one.
#include <utility>

#include "layer.h"

namespace sslc {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Lanes __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
constexpr int kLanes = 4;

inline Vec zero() { return Vec{}; }
inline Vec all(float value) { return Vec{value, value, value, value}; }
inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
// Without a POPCNT instruction the builtin is a call.
inline int count_bits(uint64_t word) {
  word -= word >> 1 & 0x5555555555555555;
  word = (word & 0x3333333333333333) + (word >> 2 & 0x3333333333333333);
  word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0f;
  return static_cast<int>(word * 0x0101010101010101 >> 56);
}

inline Lanes load_lanes(const uint8_t* p) {
  Lanes v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Lanes all_lanes(const uint8_t* p) {
  int32_t lane;
  __builtin_memcpy(&lane, p, 4);
  return Lanes{lane, lane, lane, lane};
}
inline Vec as_floats(Lanes lanes) { return reinterpret_cast<Vec>(lanes); }
inline Lanes no_lanes() { return Lanes{}; }
inline Vec to_floats(Lanes lanes) { return __builtin_convertvector(lanes, Vec); }
inline Lanes low_halves(Lanes v) { return reinterpret_cast<Lanes>(reinterpret_cast<Words>(v) << 16) >> 16; }
inline Lanes high_halves(Lanes v) { return v >> 16; }
inline Lanes dot_int16(Lanes sums, Lanes a, Lanes b) {
  return sums + low_halves(a) * low_halves(b) + high_halves(a) * high_halves(b);
}

inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
inline void prefetch_far(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

template <int Size>
inline float value_at(const uint8_t* p) {
  return Size == 4 ? load_f32(p) : load_bf16(p);
}

// Four bits of the mask at a time: which of the next values goes to each lane, and which lanes are kept.
struct Spreads {
  uint8_t from[16][4];
  Lanes keep[16];
  uint8_t count[16];
};

constexpr Spreads make_spreads() {
  Spreads t{};
  for (int mask = 0; mask < 16; ++mask) {
    int32_t keep[4] = {};
    for (int i = 0; i < 4; ++i)
      if ((mask >> i & 1) != 0) {
        t.from[mask][i] = t.count[mask]++;
        keep[i] = -1;
      }
    t.keep[mask] = Lanes{keep[0], keep[1], keep[2], keep[3]};
  }
  return t;
}

constexpr Spreads kSpreads = make_spreads();

template <int Size>
struct Type {
  static constexpr int kSize = Size, kStep = 16;
  static constexpr bool kNaturalOrder = true;
  static int64_t position(int64_t k) { return k; }
  static void expand(uint64_t mask, const uint8_t* p, Vec* w) {
    for (int i = 0; i < kStep / 4; ++i) {
      const uint64_t four = mask >> (4 * i) & 15;
      const uint8_t* from = kSpreads.from[four];
      const Vec v = {value_at<Size>(p + Size * from[0]), value_at<Size>(p + Size * from[1]),
                     value_at<Size>(p + Size * from[2]), value_at<Size>(p + Size * from[3])};
      w[i] = reinterpret_cast<Vec>(reinterpret_cast<Lanes>(v) & kSpreads.keep[four]);
      p += Size * kSpreads.count[four];
    }
  }
  static void dense(const uint8_t* p, int count, Vec* w) {
    float spread[kStep] = {};
    for (int i = 0; i < count; ++i) spread[i] = value_at<Size>(p + i * kSize);
    __builtin_memcpy(w, spread, sizeof spread);
  }
  static void dense(const uint8_t* p, Vec* w) { dense(p, kStep, w); }
  static Vec broadcast(const uint8_t* p) {
    const float value = value_at<Size>(p);
    return Vec{value, value, value, value};
  }
  static constexpr int rows(int) { return 1; }
};

// 64 columns in 16 bits.
struct Integer {
  struct Wide {
    int16_t column[kBlock];
  };
  static constexpr int kParts = 1;
  static Vec dot(const Wide* w, const int16_t* q) {
    int32_t sums[kLanes] = {};
    for (int k = 0; k < kBlock; k += 2 * kLanes)
      for (int i = 0; i < kLanes; ++i)
        sums[i] += w->column[k + 2 * i] * q[k + 2 * i] + w->column[k + 2 * i + 1] * q[k + 2 * i + 1];
    return Vec{static_cast<float>(sums[0]), static_cast<float>(sums[1]), static_cast<float>(sums[2]),
               static_cast<float>(sums[3])};
  }
  static constexpr int rows(int) { return 1; }
};

struct Int8 : Integer {
  static constexpr int kPerByte = 1;
  static constexpr float kUnit = 1;
  static void expand(uint64_t mask, const uint8_t* p, Wide* w) {
    *w = {};
    for (; mask != 0; mask &= mask - 1) w->column[__builtin_ctzll(mask)] = static_cast<int8_t>(*p++);
  }
};

struct Int4 : Integer {
  static constexpr int kPerByte = 2;
  static constexpr float kUnit = 1;
  static void expand(uint64_t mask, const uint8_t* p, Wide* w) {
    *w = {};
    for (int i = 0; mask != 0; mask &= mask - 1, ++i) {
      const int code = p[i / 2] >> (i % 2 * 4) & 15;
      w->column[__builtin_ctzll(mask)] = static_cast<int16_t>((code ^ 8) - 8);
    }
  }
};

inline void widen_scales(const uint8_t* p, int count, float* out) { widen_halves(p, count, out); }

using F32 = Type<4>;
using Bf16 = Type<2>;

constexpr int kFewGroup = 4;
constexpr bool kBytePlanes = false, kUnpackRuns = false;
#define SSLC_FEW_INTEGERS "few_integers.inc"
constexpr int kTileColumns = 32;
constexpr int kWideChains = 1, kMostListed = 0, kNarrowChains = 1, kNarrowRun = 1;
constexpr int tile_rows(int) { return 2; }

#include "kernels.inc"

}  // namespace

extern const Kernels kPortable = kernels_named("portable", 4, 9);

}  // namespace sslc
