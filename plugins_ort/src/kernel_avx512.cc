#include <immintrin.h>

#include <utility>

#include "layer.h"

namespace sslc {
namespace {

#include "avx512.inc"

#include "kernels.inc"

constexpr Kernels with_quads(Kernels kernels) {
  kernels.int8_quads = lane_kernels_of<IntegerQuads<Int8>>(10);
  kernels.int4_quads = lane_kernels_of<IntegerQuads<Int4>>(10);
  return kernels;
}

}  // namespace

extern const Kernels kAvx512 = with_quads(kernels_named("avx512", 15, 12));

}  // namespace sslc
