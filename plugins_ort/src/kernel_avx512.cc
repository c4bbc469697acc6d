#include <immintrin.h>

#include <utility>

#include "layer.h"

namespace sslc {
namespace {

#include "avx512.inc"

#include "kernels.inc"

}  // namespace

extern const Kernels kAvx512 = kernels_named("avx512", 24, 13);

}  // namespace sslc
