#include "forward.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>

namespace sslc {
namespace {

// Memory of the calling thread that later calls use again: activations in the kernel's order, and t = V x.
class Scratch {
 public:
  float* at_least(int64_t floats) {
    if (floats > size_) {
      size_ = 0;
      data_.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(round_up(floats * 4, 64)))));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = floats;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

thread_local Scratch scratch;

// Calls body(begin, end) for pieces of [0, count) that are multiples of `piece` long.
template <class Body>
void for_ranges(const Parallel& parallel, int64_t count, int64_t piece, const Body& body) {
  struct Task {
    const Body* body;
    int64_t count, piece;
  } task{&body, count, piece};
  const int64_t pieces = (count + piece - 1) / piece;
  if (pieces == 1) return body(int64_t{0}, count);
  if (pieces == 0) return;
  parallel.run(
      parallel.context,
      [](void* user, size_t i) {
        const Task& task = *static_cast<const Task*>(user);
        const int64_t begin = static_cast<int64_t>(i) * task.piece;
        (*task.body)(begin, std::min(begin + task.piece, task.count));
      },
      static_cast<size_t>(pieces), &task);
}

// Rows per task when the weights are streamed: one task per thread, or several of at least 1 MiB. A stream prefetches
// 16 KiB beyond its end for nothing, and takes a while to come up to the bandwidth of memory: few long ones are best.
int64_t rows_per_task(int64_t rows, double bytes_per_row) {
  // The runtime does not tell how many threads it has. It rarely has more than this.
  static const double threads = std::max(1.0, static_cast<double>(std::thread::hardware_concurrency()));
  const double bytes = static_cast<double>(rows) * bytes_per_row;
  const double most = threads * std::max(1.0, std::floor(bytes / threads / (1 << 20)));
  const double tasks = std::clamp(std::floor(bytes / 65536), 1.0, most);
  return std::max<int64_t>(round_up(static_cast<int64_t>(std::ceil(static_cast<double>(rows) / tasks)), 4), 4);
}

std::string text(int64_t number) { return std::to_string(number); }

}  // namespace

const TypeKernels& PreparedLayer::of_type() const {
  return layer_.dtype == Dtype::f32 ? kernels_->f32 : kernels_->bf16;
}

const IntegerKernels& PreparedLayer::of_integers(int64_t M) const {
  const bool int8 = layer_.dtype == Dtype::i8;
  const IntegerKernels& few8 = int8 ? kernels_->int8_few8 : kernels_->int4_few8;
  if (layer_.activation_bits == 8 && M > 1 && few8.rows != nullptr) return few8;
  return int8 ? kernels_->int8 : kernels_->int4;
}

bool PreparedLayer::prepare(const Layer& weights, int64_t value_count, const Kernels* kernels, std::string* error) {
  layer_ = weights;
  kernels_ = kernels;
  Layer& layer = layer_;
  if (layer.N < 1 || layer.K < 1) {
    *error = "the layer has " + text(layer.N) + " outputs and " + text(layer.K) + " inputs; neither may be 0";
    return false;
  }
  if (is_integer(layer.dtype) != (layer.scales != nullptr)) {
    *error = layer.scales == nullptr ? "int8 and int4 values need scales" : "float values have no scales";
    return false;
  }
  if (layer.activation_bits != 16 && layer.activation_bits != 8) {
    *error = "activations of " + text(layer.activation_bits) + " bits; 16 and 8 are known";
    return false;
  }
  const bool int4 = layer.dtype == Dtype::i4;
  const int64_t size = is_integer(layer.dtype) ? 1 : factor_size_of(layer.dtype);
  row_start_.resize(static_cast<size_t>(layer.N + 1));
  const int last_columns = static_cast<int>(layer.K - (layer.words - 1) * kBlock);
  const uint64_t padding = last_columns == 64 ? 0 : ~uint64_t{0} << last_columns;
  for (int64_t n = 0; n < layer.N; ++n) {
    const uint8_t* row = layer.bitmap + 8 * n * layer.words;
    uint64_t last;
    std::memcpy(&last, row + 8 * (layer.words - 1), 8);
    if ((last & padding) != 0) {
      *error = "row " + text(n) + " of the bitmap has bits beyond column " + text(layer.K - 1) +
               "; the padding of a row must be 0";
      return false;
    }
    const size_t i = static_cast<size_t>(n);
    row_start_[i + 1] = row_start_[i] + (int4 ? kernels->int4_bytes : kernels->popcount)(row, layer.words) * size;
  }
  const int64_t bytes = row_start_.back();
  if (bytes != value_count * size) {
    *error = "the bitmap says that " + text(bytes / size) + (int4 ? " bytes of int4" : "") +
             " values are stored, but there are " + text(value_count);
    return false;
  }
  // Rows whose last vector load could leave the tensor are read from a copy with room behind it.
  layer.tail_row = layer.N;
  while (layer.tail_row > 0 && row_start_[static_cast<size_t>(layer.tail_row)] + kOverread > bytes) --layer.tail_row;
  const int64_t tail_start = row_start_[static_cast<size_t>(layer.tail_row)];
  tail_.assign(static_cast<size_t>(bytes - tail_start + kOverread), 0);
  if (bytes > tail_start)
    std::memcpy(tail_.data(), layer.values + tail_start, static_cast<size_t>(bytes - tail_start));
  layer.row_start = row_start_.data();
  layer.tail = tail_.data();
  if (is_integer(layer.dtype) && of_integers(1).offset) of_zero_ = rows_of_zero();
  layer.of_zero = of_zero_.data();
  return true;
}

// What S alone makes of a token of zeros, without its scale, where the kernel adds something to q.
std::vector<float> PreparedLayer::rows_of_zero() const {
  const size_t N = static_cast<size_t>(layer_.N), Kp = static_cast<size_t>(layer_.words * kBlock);
  const std::vector<float> none(N);
  std::vector<float> x(Kp), y(N);
  std::vector<int16_t> q(Kp);
  float scale;
  of_integers(1).quantize(x.data(), 1, layer_.K, layer_.words * kBlock, q.data(), &scale);
  scale = 1;
  Layer sparse = layer_;
  sparse.r = 0;
  sparse.bias = reinterpret_cast<const uint8_t*>(none.data());
  sparse.of_zero = none.data();
  of_integers(1).rows(sparse, 0, layer_.N, q.data(), &scale, nullptr, 1, y.data());
  return y;
}

void PreparedLayer::forward(const float* x, int64_t M, float* y, const Parallel& parallel) const {
  if (M <= 0) return;
  if (const LaneKernels* lanes = lanes_for(M))
    forward_lanes(*lanes, x, M, y, parallel);
  else if (is_integer(layer_.dtype))
    forward_integers(x, M, y, parallel);
  else if (M <= kernels_->few)
    forward_few(x, M, y, parallel);
  else
    forward_many(x, M, y, parallel);
}

void PreparedLayer::forward_few(const float* x, int64_t M, float* y, const Parallel& parallel) const {
  const TypeKernels& kernels = of_type();
  const int64_t Kp = layer_.words * kBlock, rp = round_up(layer_.r, kBlock);
  // Vectors that cross cache lines cost more than the copy.
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 64 == 0;
  const bool in_place = M == 1 && kernels.natural_order && layer_.K == Kp && aligned;
  float* t = scratch.at_least(M * (rp + Kp));
  std::memset(t, 0, static_cast<size_t>(M * rp) * sizeof(float));
  if (!in_place) {
    float* arranged = t + M * rp;
    kernels.arrange(x, M, layer_.K, Kp, arranged);
    x = arranged;
  }
  const double size = static_cast<double>(factor_size_of(layer_.dtype)), K = static_cast<double>(layer_.K);
  const double stored = static_cast<double>(row_start_.back()) / static_cast<double>(layer_.N);
  for_ranges(parallel, layer_.r, rows_per_task(layer_.r, K * size),
             [&](int64_t begin, int64_t end) { kernels.project_few(layer_, begin, end, x, M, t); });
  const double row_bytes = stored + static_cast<double>(layer_.r) * size + K / 8;
  for_ranges(parallel, layer_.N, rows_per_task(layer_.N, row_bytes),
             [&](int64_t begin, int64_t end) { kernels.rows_few(layer_, begin, end, x, t, M, y); });
}

// Null where this many tokens are not multiplied in lanes of 16 or 8 bits.
const LaneKernels* PreparedLayer::lanes_for(int64_t M) const {
  const auto from = [M](const LaneKernels& kernels) { return kernels.from > 0 && M >= kernels.from ? &kernels : nullptr; };
  const bool few_bits = layer_.activation_bits == 8;
  switch (layer_.dtype) {
    case Dtype::i8: return few_bits && from(kernels_->int8_quads) ? &kernels_->int8_quads : from(kernels_->int8_pairs);
    case Dtype::i4: return few_bits && from(kernels_->int4_quads) ? &kernels_->int4_quads : from(kernels_->int4_pairs);
    case Dtype::bf16: return from(kernels_->bf16_pairs);
    default: return nullptr;
  }
}

void PreparedLayer::forward_lanes(const LaneKernels& kernels, const float* x, int64_t M, float* y,
                                  const Parallel& parallel) const {
  const int64_t N = layer_.N, K = layer_.K, Kp = layer_.words * kBlock, r = layer_.r, rp = round_up(r, kBlock);
  const int64_t units = (M + 15) / 16, tiles = (M + kernels.columns - 1) / kernels.columns;
  for (int64_t tile = 0, m = 0; tile < tiles; ++tile) {
    const int64_t columns = (units * (tile + 1) / tiles - units * tile / tiles) * 16;
    const int64_t count = std::min(columns, M - m);
    float* t = scratch.at_least((rp + Kp / 2 + 1) * columns);
    uint8_t* lanes = reinterpret_cast<uint8_t*>(t + rp * columns);
    float* scales = t + (rp + Kp / 2) * columns;
    std::memset(t + r * columns, 0, static_cast<size_t>((rp - r) * columns) * sizeof(float));
    for_ranges(parallel, columns, 16, [&](int64_t begin, int64_t) {
      kernels.to_lanes(x + m * K, count, K, Kp, begin, columns, lanes, scales);
    });
    for_ranges(parallel, r, std::max<int64_t>(round_up(r / 2, 16), 16), [&](int64_t begin, int64_t end) {
      kernels.project(layer_, begin, end, lanes, columns, t);
    });
    for_ranges(parallel, N, std::max<int64_t>(round_up(N / 8, 32), 32), [&](int64_t begin, int64_t end) {
      kernels.rows(layer_, begin, end, lanes, scales, t, columns, count, y + m * N);
    });
    m += count;
  }
}

void PreparedLayer::forward_integers(const float* x, int64_t M, float* y, const Parallel& parallel) const {
  const IntegerKernels& kernels = of_integers(M);
  const int64_t Kp = layer_.words * kBlock, rp = round_up(layer_.r, kBlock);
  const double K = static_cast<double>(layer_.K), factor = static_cast<double>(factor_size_of(layer_.dtype));
  const double stored = static_cast<double>(row_start_.back()) / static_cast<double>(layer_.N);
  const double row_bytes = stored + static_cast<double>(layer_.r) * factor + K / 8 + K / 32;
  constexpr int64_t kMost = 96;  // tokens whose activations stay in the L2 cache
  const int64_t passes = (M + kMost - 1) / kMost;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = M * pass / passes, count = M * (pass + 1) / passes - first;
    float* t = scratch.at_least(count * (rp + Kp + Kp / 2 + 1));
    float* arranged = t + count * rp;
    int16_t* q = reinterpret_cast<int16_t*>(arranged + count * Kp);
    float* scales = arranged + count * (Kp + Kp / 2);
    if (layer_.r > 0) {
      std::memset(t, 0, static_cast<size_t>(count * rp) * sizeof(float));
      kernels_->bf16.arrange(x + first * layer_.K, count, layer_.K, Kp, arranged);
    }
    kernels.quantize(x + first * layer_.K, count, layer_.K, Kp, q, scales);
    for_ranges(parallel, layer_.r, rows_per_task(layer_.r, K * factor), [&](int64_t begin, int64_t end) {
      kernels_->bf16.project_few(layer_, begin, end, arranged, count, t);
    });
    for_ranges(parallel, layer_.N, rows_per_task(layer_.N, row_bytes), [&](int64_t begin, int64_t end) {
      kernels.rows(layer_, begin, end, q, scales, t, count, y + first * layer_.N);
    });
  }
}

void PreparedLayer::forward_many(const float* x, int64_t M, float* y, const Parallel& parallel) const {
  const TypeKernels& kernels = of_type();
  const int64_t N = layer_.N, K = layer_.K, r = layer_.r;
  // Tiles of about equal width: a narrow one uses the weights badly.
  const int64_t units = (M + 15) / 16, tiles = (M + kernels_->columns - 1) / kernels_->columns;
  for (int64_t tile = 0, m = 0; tile < tiles; ++tile) {
    const int64_t columns = (units * (tile + 1) / tiles - units * tile / tiles) * 16;
    const int64_t count = std::min(columns, M - m);
    float* xT = scratch.at_least((K + r) * columns);
    float* tT = xT + K * columns;
    for_ranges(parallel, K, 512,
               [&](int64_t begin, int64_t end) { kernels_->transpose(x + m * K, K, begin, end, count, columns, xT); });
    for_ranges(parallel, r, 16,
               [&](int64_t begin, int64_t end) { kernels.project_many(layer_, begin, end, xT, columns, tT); });
    const int64_t panel = std::clamp<int64_t>(round_up(N / 8, 16), 16, kPanel);
    for_ranges(parallel, N, panel, [&](int64_t begin, int64_t end) {
      kernels.rows_many(layer_, begin, end, xT, tT, columns, count, y + m * N);
    });
    m += count;
  }
}

}  // namespace sslc
