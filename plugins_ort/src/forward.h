// A layer that is ready to run, and its forward pass.
#pragma once

#include <string>
#include <vector>

#include "layer.h"

namespace sslc {

// The weights are borrowed and must outlive this object.
class PreparedLayer {
 public:
  // Checks the weights and finds where each row's values start. False, with the reason in *error, if they disagree.
  // `value_count` is the number of elements of their tensor: of bytes, if the values are int4.
  bool prepare(const Layer& weights, int64_t value_count, const Kernels* kernels, std::string* error);

  // Y [M, N] = X [M, K] (S + U V)^T + bias, all row-major f32. May throw std::bad_alloc, before any task has run.
  void forward(const float* x, int64_t M, float* y, const Parallel& parallel) const;

  const Layer& layer() const { return layer_; }

 private:
  const TypeKernels& of_type() const;
  const IntegerKernels& of_integers(int64_t M) const;
  std::vector<float> rows_of_zero() const;
  void forward_few(const float* x, int64_t M, float* y, const Parallel& parallel) const;
  void forward_integers(const float* x, int64_t M, float* y, const Parallel& parallel) const;
  const LaneKernels* lanes_for(int64_t M) const;
  void forward_lanes(const LaneKernels& kernels, const float* x, int64_t M, float* y, const Parallel& parallel) const;
  void forward_many(const float* x, int64_t M, float* y, const Parallel& parallel) const;

  Layer layer_{};
  const Kernels* kernels_ = nullptr;
  std::vector<int64_t> row_start_;
  std::vector<uint8_t> tail_;
  std::vector<float> of_zero_;
};

}  // namespace sslc
