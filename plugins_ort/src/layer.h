// One compressed linear layer, Y = X (S + U V)^T + bias, as the kernels see it. Layout "rows64": docs/kernel-cpu.md.
//
// This header is included by files that are compiled for one instruction set each, so that it holds plain structs and
// static functions only. An inline function that such a file instantiates (one of the standard library, say) could be
// the copy that the linker keeps for all, and would then run on processors that lack the instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sslc {

// The type of the values. ONNX's numbers (TensorProto.DataType); int4 values lie in a tensor of uint8, two in each.
enum class Dtype : int32_t { f32 = 1, i4 = 2, i8 = 3, bf16 = 16 };

static constexpr bool is_integer(Dtype dtype) { return dtype == Dtype::i4 || dtype == Dtype::i8; }

// Bytes of one value of U and V, which are bfloat16 beside integer values.
static constexpr int64_t factor_size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

constexpr int64_t kBlock = 64;  // columns under one 64-bit word of the bitmap
constexpr int64_t kPanel = 128;  // most rows per call of the many-token kernels

// A kernel may read this many bytes beyond the last value of a row: vector loads are whole.
constexpr int64_t kOverread = 64;

static constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline uint64_t load_word(const uint8_t* p) {
  uint64_t word;
  __builtin_memcpy(&word, p, 8);
  return word;
}

static inline float load_f32(const uint8_t* p) {
  float value;
  __builtin_memcpy(&value, p, 4);
  return value;
}

static inline float load_bf16(const uint8_t* p) {
  uint16_t half;
  __builtin_memcpy(&half, p, 2);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// float16 to float32, for `count` finite numbers that are not negative.
static inline void widen_halves(const uint8_t* p, int count, float* out) {
  for (int i = 0; i < count; ++i) {
    uint16_t half;
    __builtin_memcpy(&half, p + 2 * i, 2);
    const uint32_t bits = (uint32_t{half} << 13) + 0x38000000u;
    float normal;
    __builtin_memcpy(&normal, &bits, 4);
    out[i] = half < 0x400 ? static_cast<float>(half) * 0x1p-24f : normal;
  }
}

// Borrowed pointers, aligned to nothing in particular: they point into a mapped file.
struct Layer {
  Dtype dtype;
  int64_t N, K, r;
  int64_t words;             // 64-bit words per row of the bitmap
  const uint8_t* bitmap;     // [N, words], bit k of a row says that S[n, k] is stored
  const uint8_t* values;     // stored entries of S, row by row; int4: those under one word start at a whole byte
  const uint8_t* scales;     // [N, words] f16: what integer values under one word are multiplied with; else nullptr
  const uint8_t* U;          // [N, r]
  const uint8_t* V;          // [r, K]
  const uint8_t* bias;       // [N] f32
  const int64_t* row_start;  // [N + 1], where in `values` each row starts, in bytes
  int activation_bits;       // beside integer values: 16, or 8 where there are many tokens and kernels for it
  int64_t tail_row;          // from this row on, values are read from the padded copy: reading kOverread bytes
  const uint8_t* tail;       // beyond the row would leave the tensor, which may be the end of a mapping
  const float* of_zero;      // [N] what rows() of IntegerKernels with `offset` have too much, per scale
};

static inline const uint8_t* row_values(const Layer& layer, int64_t n) {
  return n < layer.tail_row ? layer.values + layer.row_start[n]
                            : layer.tail + (layer.row_start[n] - layer.row_start[layer.tail_row]);
}

// What one instruction set provides for one value type. Row ranges are [begin, end).
//
// Few tokens: x and t are as arrange() lays them out, padded with zeros to words * 64 columns and to a multiple of 64.
// Many tokens: x^T is [K, columns] and t^T is [r, columns]; columns is a multiple of 16.
struct TypeKernels {
  bool natural_order;  // for one token arrange() only pads
  void (*arrange)(const float* x, int64_t M, int64_t K, int64_t padded, float* out);
  void (*project_few)(const Layer&, int64_t begin, int64_t end, const float* x, int64_t M, float* t);
  void (*rows_few)(const Layer&, int64_t begin, int64_t end, const float* x, const float* t, int64_t M, float* y);
  void (*project_many)(const Layer&, int64_t begin, int64_t end, const float* xT, int64_t columns, float* tT);
  void (*rows_many)(const Layer&, int64_t begin, int64_t end, const float* xT, const float* tT, int64_t columns,
                    int64_t M, float* y);
};

// What one instruction set provides for int8 or int4 values, beside the kernels of bf16, which U and V are.
//
// Activations are rounded to 16 bits, token by token: x = scale * q with |q| <= 32767. Sums of q times a value are exact
// within a block of 64 columns. q lies block by block: the 64 columns of the first token, those of the next, ... With
// activations of 8 bits, q holds what quantize() makes of them, in no more bytes.
struct IntegerKernels {
  bool offset;  // q is q + 32768, in an order of the kernel's own
  void (*quantize)(const float* x, int64_t M, int64_t K, int64_t padded, int16_t* q, float* scales);
  void (*rows)(const Layer&, int64_t begin, int64_t end, const int16_t* q, const float* scales, const float* t,
               int64_t M, float* y);
};

// What one instruction set provides for many tokens in 16 or 8 bits: of integer values, and of bfloat16 values where it
// multiplies pairs of them. Activations are x^T in lanes of 32 bits, two or four columns in each, K padded to a multiple
// of 64: at most [K / 2, columns].
struct LaneKernels {
  int64_t from;     // this many tokens or more; 0 if there are no such kernels
  int64_t columns;  // the widest tile, a multiple of 16
  // Tokens [first, first + 16) of a tile, from x [M, K]; those beyond M are zero.
  void (*to_lanes)(const float* x, int64_t M, int64_t K, int64_t padded, int64_t first, int64_t columns, uint8_t* lanes,
                   float* scales);
  // t^T [r, columns], without the scales of the tokens.
  void (*project)(const Layer&, int64_t begin, int64_t end, const uint8_t* lanes, int64_t columns, float* tT);
  void (*rows)(const Layer&, int64_t begin, int64_t end, const uint8_t* lanes, const float* scales, const float* tT,
               int64_t columns, int64_t M, float* y);
};

struct Kernels {
  const char* name;
  int64_t few;      // up to this many tokens the few-token kernels are faster (docs/kernel-cpu.md)
  int64_t columns;  // the widest tile of the many-token kernels
  TypeKernels f32, bf16;
  IntegerKernels int8, int4;
  LaneKernels int8_pairs, int4_pairs, bf16_pairs;
  LaneKernels int8_quads, int4_quads;   // with activations of 8 bits
  IntegerKernels int8_few8, int4_few8;  // the same for few tokens, two or more; null where there are none
  // Rows [begin, end) of x^T, from x [M, K]; columns beyond M are zero.
  void (*transpose)(const float* x, int64_t K, int64_t begin, int64_t end, int64_t M, int64_t columns, float* xT);
  int64_t (*popcount)(const uint8_t* words, int64_t count);    // bits set in `count` 64-bit words
  int64_t (*int4_bytes)(const uint8_t* words, int64_t count);  // bytes of the int4 values under them
  uint64_t (*read)(const uint8_t* data, int64_t bytes);        // reads all bytes, for measuring bandwidth
};

// Runs task(user, i) for every i < count, on any threads, in any order.
struct Parallel {
  void* context;
  void (*run)(void* context, void (*task)(void* user, size_t i), size_t count, void* user);
};

}  // namespace sslc
