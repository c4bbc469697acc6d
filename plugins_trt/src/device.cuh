// The few device primitives that the kernels use. nvcc gets the instructions; any other compiler gets the CPU emulator
// (emulator/cuda.h), so that the same kernel source runs under sanitizers on a machine without a GPU.
//
// 16-bit floats travel as raw bits (uint16_t, or two in a uint32_t): the template argument `Type` says what they mean.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sslc {
enum Type : int { kF16 = 0, kBF16 = 1 };
}

#ifndef __CUDACC__
#include "../emulator/cuda.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SSLC_DEVICE __device__ __forceinline__
#define SSLC_HOST_DEVICE __host__ __device__ __forceinline__
#define SSLC_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define SSLC_UNROLL _Pragma("unroll")
#define SSLC_NO_UNROLL _Pragma("unroll 1")

namespace sslc {

template <int T> SSLC_DEVICE float to_float(uint16_t bits) {
  if constexpr (T == kF16) return __half2float(__ushort_as_half(bits));
  else return __bfloat162float(__ushort_as_bfloat16(bits));
}

template <int T> SSLC_DEVICE uint16_t from_float(float value) {
  if constexpr (T == kF16) return __half_as_ushort(__float2half_rn(value));
  else return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// Two halves minus two halves, bit patterns in and out.
SSLC_DEVICE uint32_t subtract_half2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// The same value, but what depends on it is computed anew instead of being kept in registers across a loop.
SSLC_DEVICE uint32_t compute_anew(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Byte permute: nibble i of `select` names the byte of (b:a) that becomes byte i. Bit 3 of a nibble would replicate
// that byte's sign instead: every selector built here keeps it 0.
SSLC_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t select) {
  uint32_t r;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(select));
  return r;
}

SSLC_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return __funnelshift_r(low, high, shift);
}

// 16 bytes from global to shared memory, asynchronously, past the L1 cache: weights are read once.
SSLC_DEVICE void copy16_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(global) : "memory");
}

SSLC_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are under way. It says nothing about other threads' copies: a barrier
// must follow before their bytes are read.
template <int N> SSLC_DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// 16 bytes of global memory past the L1 cache: for what a kernel that still runs may have written.
SSLC_DEVICE uint4 load16_past_l1(const void* global) {
  uint4 r;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(global) : "memory");
  return r;
}

// Programmatic dependent launch: the next kernel of the stream may start when all blocks of this one have, ...
SSLC_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ... and waits here until this one has ended and its results can be read.
SSLC_DEVICE void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// c[16 x 8] += a[16 x 16] . b[16 x 8], f32 accumulation; fragments as in the PTX manual, "mma.m16n8k16".
template <int T>
SSLC_DEVICE void mma(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (T == kF16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// value of this lane + value of lane - distance where there is one: the step of an inclusive warp scan. shfl's own
// predicate says whether there is one, which saves the comparison.
SSLC_DEVICE uint32_t add_from_lane_below(uint32_t value, int distance, int /*lane*/) {
  uint32_t r;
  asm volatile(
      "{ .reg .pred p; .reg .b32 o; shfl.sync.up.b32 o|p, %1, %2, 0, 0xffffffff; mov.b32 %0, %1; @p add.u32 %0, o, %1; }"
      : "=r"(r)
      : "r"(value), "r"(distance));
  return r;
}

}  // namespace sslc
#endif
