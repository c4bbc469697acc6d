// AVX-512 with BF16 (Zen 4, Sapphire Rapids and later): many tokens times bfloat16 values.
#include <immintrin.h>

#include "layer.h"

namespace sslc {
namespace {

#include "avx512.inc"

#include "lanes.inc"

#include "pairs_bf16.inc"

}  // namespace

extern const LaneKernels kAvx512Bf16Pairs = lane_kernels_of<Bf16Pairs>(9);

}  // namespace sslc
