#include <immintrin.h>

#include <utility>

#include "layer.h"

namespace sslc {
namespace {

#include "avx2.inc"

#include "kernels.inc"

}  // namespace

extern const Kernels kAvx2 = kernels_named("avx2", 12, 10);

}  // namespace sslc
