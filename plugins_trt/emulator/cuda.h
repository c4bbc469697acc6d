// Runs cooperative CUDA C++ kernels on the CPU, for tests: every CUDA thread is a real thread (SSLC_EMULATOR_THREADS,
// what the thread sanitizer needs) or a fiber of one thread (default: fast enough for true layer sizes).
//
// What it is strict about, because a GPU is not:
//  - shared memory starts as 0xCD bytes and has exactly the size that was asked for (address sanitizer);
//  - asynchronous copies land as late as they may (at the wait that orders them) or at once, by `copies_land_late`;
//    a right pipeline gives the same result both ways;
//  - threads run in lane order or in reverse, by `reverse_order`;
//  - uint4 is aligned to 16 bytes, as a 128-bit load needs it (undefined-behaviour sanitizer).
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if !defined(__x86_64__) && !defined(SSLC_EMULATOR_THREADS)
#define SSLC_EMULATOR_THREADS  // the fiber switch below is written for x86-64
#endif
#ifdef SSLC_EMULATOR_THREADS
#include <barrier>
#include <thread>
#endif

#define __global__
#define __restrict__
#define __launch_bounds__(...)
#define SSLC_DEVICE inline
#define SSLC_HOST_DEVICE inline
#define SSLC_UNROLL
#define SSLC_NO_UNROLL

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) float4 { float x, y, z, w; };

namespace emulator {

inline bool copies_land_late = true, reverse_order = false;

struct Copy { void* to; const void* from; };

#ifdef SSLC_EMULATOR_THREADS
struct Barrier {
  explicit Barrier(int n) : b(n) {}
  void wait() { b.arrive_and_wait(); }
  std::barrier<> b;
};
#else
void yield();
struct Barrier {
  explicit Barrier(int n) : size(n) {}
  void wait() {
    const unsigned mine = generation;
    if (++arrived == size) arrived = 0, generation++;
    while (generation == mine) yield();
  }
  int size, arrived = 0;
  unsigned generation = 0;
};
#endif

struct Warp {
  Barrier barrier{32};
  uint32_t word[32];
  float a[16][16], b[8][16];  // the operands of the mma in progress
};

struct Block {
  explicit Block(int threads, size_t shared_bytes) : barrier(threads), warps(threads / 32) {
    for (auto& w : warps) w = std::make_unique<Warp>();
    // operator new aligns to 16; an exact size lets the address sanitizer see a stray read or write.
    shared.reset(new unsigned char[shared_bytes]);
    std::memset(shared.get(), 0xCD, shared_bytes);
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<unsigned char[]> shared;
};

struct Thread {
  dim3 index, block_index, block_size, grid_size;
  Block* block = nullptr;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  bool finished = false;
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  Warp& warp() { return *block->warps[index.x / 32]; }
  int lane() const { return index.x % 32; }
};

#ifdef SSLC_EMULATOR_THREADS
inline thread_local Thread* self;
#else
inline Thread* self;
#endif

}  // namespace emulator

#define threadIdx (emulator::self->index)
#define blockIdx (emulator::self->block_index)
#define blockDim (emulator::self->block_size)
#define gridDim (emulator::self->grid_size)
#define SSLC_DYNAMIC_SHARED(name) unsigned char* const name = emulator::self->block->shared.get()

inline void __syncthreads() { emulator::self->block->barrier.wait(); }
inline void __syncwarp() { emulator::self->warp().barrier.wait(); }

namespace sslc {

template <int T> inline float to_float(uint16_t bits) {
  if constexpr (T == kF16) {
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return static_cast<float>(h);
  } else {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
}

template <int T> inline uint16_t from_float(float value) {
  uint16_t bits;
  if constexpr (T == kF16) {
    const _Float16 h = static_cast<_Float16>(value);
    std::memcpy(&bits, &h, 2);
  } else {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if (value != value) return 0x7fff;
    bits = static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);  // round to nearest, ties to even
  }
  return bits;
}

inline uint32_t subtract_half2(uint32_t a, uint32_t b) {
  const uint32_t low = from_float<kF16>(to_float<kF16>(a & 0xffff) - to_float<kF16>(b & 0xffff));
  const uint32_t high = from_float<kF16>(to_float<kF16>(a >> 16) - to_float<kF16>(b >> 16));
  return low | high << 16;
}

inline uint32_t compute_anew(uint32_t value) { return value; }

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t nibble = select >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}

inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

inline void copy16_async(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16) {
    std::fprintf(stderr, "copy16_async: an address is not a multiple of 16\n");
    std::abort();
  }
  if (emulator::copies_land_late) emulator::self->open.push_back({shared, global});
  else std::memcpy(shared, global, 16);
}

inline void commit_copies() {
  emulator::self->groups.push_back(std::move(emulator::self->open));
  emulator::self->open.clear();
}

template <int N> inline void wait_copies() {
  auto& groups = emulator::self->groups;
  while (static_cast<int>(groups.size()) > N) {
    for (const emulator::Copy& c : groups[0]) std::memcpy(c.to, c.from, 16);
    groups.erase(groups.begin());
  }
}

inline uint4 load16_past_l1(const void* global) { return *static_cast<const uint4*>(global); }
// Kernels run one after the other here.
inline void let_next_kernel_start() {}
inline void wait_for_kernel_before() {}

template <int T>
inline void mma(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulator::Warp& w = emulator::self->warp();
  const int lane = emulator::self->lane(), g = lane / 4, t = lane % 4;
  auto put = [](float* at, uint32_t two) { at[0] = to_float<T>(two & 0xffff), at[1] = to_float<T>(two >> 16); };
  put(&w.a[g][2 * t], a0), put(&w.a[g + 8][2 * t], a1), put(&w.a[g][2 * t + 8], a2), put(&w.a[g + 8][2 * t + 8], a3);
  put(&w.b[g][2 * t], b0), put(&w.b[g][2 * t + 8], b1);
  w.barrier.wait();
  for (int i = 0; i < 4; i++) {
    const float *row = w.a[g + 8 * (i / 2)], *column = w.b[2 * t + (i & 1)];
    float sum = 0;
    for (int k = 0; k < 16; k++) sum += row[k] * column[k];
    c[i] += sum;
  }
  w.barrier.wait();
}

inline uint32_t add_from_lane_below(uint32_t value, int distance, int lane) {
  emulator::Warp& w = emulator::self->warp();
  w.word[lane] = value;
  w.barrier.wait();
  const uint32_t below = lane >= distance ? w.word[lane - distance] : 0;
  w.barrier.wait();
  return value + below;
}

}  // namespace sslc

namespace emulator {

#ifndef SSLC_EMULATOR_THREADS

inline void* scheduler_stack;
inline std::function<void()> fiber_entry;

// Saves the callee-saved registers of one stack and restores those of another (System V x86-64).
[[gnu::naked, gnu::noinline]] inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void yield() { switch_stack(&self->stack_pointer, scheduler_stack); }

inline void fiber_main() {
  fiber_entry();
  self->finished = true;
  yield();
  std::abort();  // a finished fiber is never resumed
}
#endif

template <class Kernel> void run_block(std::vector<Thread>& threads, Kernel kernel) {
  const int n = static_cast<int>(threads.size());
#ifdef SSLC_EMULATOR_THREADS
  std::vector<std::thread> running;
  for (int i = 0; i < n; i++) {
    Thread* t = &threads[reverse_order ? n - 1 - i : i];
    running.emplace_back([t, &kernel] { self = t, kernel(); });
  }
  for (auto& r : running) r.join();
#else
  constexpr size_t kStack = 64 << 10;
  fiber_entry = kernel;
  for (Thread& t : threads) {
    if (!t.stack) t.stack.reset(new char[kStack]);
    // The first switch pops six registers and returns into fiber_main; the ABI wants rsp + 8 divisible by 16 there.
    auto top = reinterpret_cast<uintptr_t>(t.stack.get() + kStack) & ~uintptr_t{15};
    void** sp = reinterpret_cast<void**>(top) - 8;
    std::memset(sp, 0, 8 * sizeof(void*));
    sp[6] = reinterpret_cast<void*>(&fiber_main);
    t.stack_pointer = sp;
    t.finished = false;
  }
  for (int left = n; left > 0;) {
    for (int i = 0; i < n; i++) {
      Thread& t = threads[reverse_order ? n - 1 - i : i];
      if (t.finished) continue;
      self = &t;
      switch_stack(&scheduler_stack, t.stack_pointer);
      left -= t.finished;
    }
  }
#endif
}

template <class Kernel> void launch(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel) {
  std::vector<Thread> threads(block.x);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        Block memory(static_cast<int>(block.x), shared_bytes);
        for (unsigned i = 0; i < block.x; i++) {
          Thread& t = threads[i];
          t.index = dim3(i, 0, 0), t.block_index = dim3(x, y, z), t.block_size = block, t.grid_size = grid;
          t.block = &memory;
          t.groups.clear(), t.open.clear();
        }
        run_block(threads, kernel);
      }
}

}  // namespace emulator
