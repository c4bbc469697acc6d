// AVX-512 and AMX with bfloat16 and int8 (Sapphire Rapids and later).
#include <immintrin.h>

#include <utility>

#include "layer.h"

namespace sslc {
namespace {

#include "avx512.inc"

#include "kernels.inc"

#include "pairs_bf16.inc"

#include "tiles.inc"

}  // namespace

extern const Kernels kAmx = with_tiles(kernels_named("amx", 15, 12), 6);

}  // namespace sslc
