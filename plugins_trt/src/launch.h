// Which kernels run for a layer and a number of tokens, with what grid, split and workspace. The plugin calls it on a
// CUDA stream, the tests on the CPU emulator: the same decisions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;
#endif

namespace sslc {

enum LayoutId : int { kAny = 0, kBank32 = 1, kFixed8 = 2 };

// One layer, or up to three of the same input: one launch for all of them, and one for all their t.
struct Layer {
  int parts = 1, K = 0;
  int out[kMaxParts] = {0, 0, 0}, rank[kMaxParts] = {0, 0, 0};
  int layout = kAny, type = kF16;  // type: of the values, U, V and of what the mma sees
  bool int8 = false;               // the values of S are int8 with one scale per row and 64 columns
  int slot = 0;                    // bytes of a ring slot: the largest tile + 32 (layout any), or the tile

  int R(int part) const { return ceil_div(rank[part], 64) * 64; }
  int row_tiles(int part) const { return ceil_div(out[part], 16); }
  int N() const { return out[0] + out[1] + out[2]; }
  int R() const { return R(0) + R(1) + R(2); }
  int most_R() const { return std::max({R(0), R(1), R(2)}); }
  int row_tiles() const { return row_tiles(0) + row_tiles(1) + row_tiles(2); }
};

struct Device {
  int multiprocessors = 0;
  int shared_bytes = 0;  // that one block may ask for
  int splits = 0;        // 0: choose; else what the tests want
  bool early = false;    // a kernel may start before the one before it has ended: compute capability 9.0 or later
};

struct Buffers {
  const void* x;
  const void *S, *U, *V;
  const float* bias;
  void* y[kMaxParts];  // one per part
  void* workspace;
};

// Up to this many tokens the packed weights are streamed (once per 64 tokens, later passes from L2), beyond it they are
// expanded first. Measured on an H100: of a block of LLaMA-2-7B, streaming takes 0.45 of the time of expansion at 128
// tokens, 0.7 at 256, and 1.05 at 512.
constexpr int kDecodeTokens = 256;
constexpr int kMostSplits = 8;

// More tokens fill the GPU with fewer splits; and this bounds the workspace.
inline int most_splits(int M) { return std::max(1, std::min(kMostSplits, kMostSplits * 64 / M)); }

// Least shared memory of a supported GPU (sm_86, 89, 120).
constexpr int kLeastShared = 99 << 10;

struct Split {
  int tiles_per_split, splits, shared_bytes, slices, groups;
};

namespace detail {

inline size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

template <class Layout> int slot_of(const Layer& layer) { return Layout::kTileBytes ? Layout::kTileBytes : layer.slot; }

template <class Layout> int ring_bytes(int slot) { return Layout::kWarps * Layout::kStages * slot; }

// Shared memory of decode(): the rings, and afterwards the warps' sums in the same place.
template <class Layout> int decode_shared(int slot, int NT) { return std::max(ring_bytes<Layout>(slot), Layout::kWarps * 512 * NT); }

// Splits the tiles of [S | U] over CTAs so that the last wave of CTAs is as full as possible. The cost of a wave is its
// tiles per warp plus three for filling the pipeline and adding up, that of several splits one more kernel, worth eight;
// ties go to fewer splits. Measured on an H100 over the layers of LLaMA-2-7B, 1 to 64 tokens and 1 to 8 splits: the choice
// is the best one or within a tenth of it in all but a few.
template <class Layout, int NT, int RT> Split split(const Device& device, int row_tiles, int tiles, int slot, int M, int most) {
  const int shared = decode_shared<Layout>(slot, NT), groups = ceil_div(row_tiles, RT), slices = ceil_div(M, 8 * NT);
  const int resident = device.multiprocessors * std::max(1, std::min(device.shared_bytes / shared, (NT == 1 ? 768 : 512) / (32 * Layout::kWarps)));
  Split best{};
  double best_cost = 0;
  for (int wanted = 1; wanted <= std::min(tiles, most); wanted++) {
    const int per = ceil_div(tiles, wanted), splits = ceil_div(tiles, per);
    const double waves = (static_cast<double>(groups) * splits * slices + resident - 1) / resident;
    const double cost = static_cast<int64_t>(waves) * (ceil_div(per, Layout::kWarps / RT) + 3.0) + (splits > 1 ? 8 : 0);
    if (best.splits == 0 || cost < best_cost || device.splits == splits) best = {per, splits, shared, slices, groups}, best_cost = cost;
    if (device.splits == splits) break;
  }
  return best;
}

#ifdef __CUDACC__
// `early`: it may start before the kernel before it has ended, and waits for it itself.
template <class Args>
cudaError_t start(void (*kernel)(Args), dim3 grid, int threads, int shared, cudaStream_t stream, const Args& args, bool early = false) {
  if (shared > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  if (!early) {
    kernel<<<grid, threads, shared, stream>>>(args);
    return cudaGetLastError();
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}
#else
template <class Args>
int start(void (*kernel)(Args), dim3 grid, int threads, int shared, cudaStream_t, const Args& args, bool = false) {
  emulator::launch(grid, dim3(threads), shared, [&] { kernel(args); });
  return cudaSuccess;
}
#endif

inline dim3 blocks_for(size_t threads) { return dim3(static_cast<unsigned>((threads + 255) / 256)); }

// f(Layout{}) with the layer's layout as a type.
template <class F> auto with_layout(const Layer& layer, F f) {
  if (layer.type == kF16) {
    if (layer.layout == kBank32) return f(Bank32<kF16>{});
    if (layer.layout == kFixed8) return layer.int8 ? f(Fixed8<kF16, true>{}) : f(Fixed8<kF16, false>{});
    return layer.int8 ? f(Any<kF16, true>{}) : f(Any<kF16, false>{});
  }
  if (layer.layout == kBank32) return f(Bank32<kBF16>{});
  if (layer.layout == kFixed8) return layer.int8 ? f(Fixed8<kBF16, true>{}) : f(Fixed8<kBF16, false>{});
  return layer.int8 ? f(Any<kBF16, true>{}) : f(Any<kBF16, false>{});
}

inline void set_parts(Part (&parts)[kMaxParts], const Layer& layer, const Buffers& b) {
  Part next;
  next.row_tile = next.rows = 0;
  next.U = static_cast<const unsigned char*>(b.U), next.bias = b.bias;
  for (int i = 0; i < layer.parts; i++) {
    next.N = layer.out[i], next.R = layer.R(i), next.y = b.y[i];
    parts[i] = next;
    next.row_tile += layer.row_tiles(i), next.rows += next.N, next.t += next.R;
    next.U += static_cast<size_t>(layer.row_tiles(i)) * (next.R / 64) * kFragmentTile;
    next.bias += next.N;
  }
}

// Rows of activations that can be read 16 bytes at a time, whole tiles of them.
struct Rows {
  const uint16_t* x;
  int pitch;  // in elements
  cudaError_t error;
};

inline bool readable(const Layer& layer, const void* x, bool f32, int columns) {
  return !f32 && layer.K % columns == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

inline size_t rows_bytes(int K, int M, int columns) { return aligned(static_cast<size_t>(M) * ceil_div(K, columns) * columns * 2); }

// x itself, or a copy of it at `room`.
template <int T> Rows rows_of(const Layer& layer, const void* x, void* room, int M, bool f32, int columns, cudaStream_t stream) {
  const int pitch = ceil_div(layer.K, columns) * columns;
  if (readable(layer, x, f32, columns)) return {static_cast<const uint16_t*>(x), pitch, cudaError_t{}};
  const bool vector = !f32 && layer.K % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const ConvertArgs c{x, static_cast<uint16_t*>(room), M, layer.K, pitch, f32, vector};
  return {c.to, pitch, start(convert<T>, blocks_for(static_cast<size_t>(M) * pitch / 8), 256, 0, stream, c)};
}

// f(std::integral_constant<int, NT>): 8 NT tokens at a time, and as many slices as M then needs.
template <class F> auto with_tokens(int M, F f) {
  if (M <= 8) return f(std::integral_constant<int, 1>{});
  if (M <= 16) return f(std::integral_constant<int, 2>{});
  if (M <= 32) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, 8>{});
}

inline cudaError_t run_decode(void (*kernel)(DecodeArgs), const Split& s, int warps, DecodeArgs& args, cudaStream_t stream, bool early) {
  args.tiles_per_split = s.tiles_per_split;
  return start(kernel, dim3(s.groups, s.splits, s.slices), 32 * warps, s.shared_bytes, stream, args, early);
}

// t = X Vᵀ [M, R] in 16 bits.
template <int T> cudaError_t run_t(const Layer& layer, const Device& device, const Rows& rows, const void* V, uint16_t* t, int M, cudaStream_t stream) {
  const int R = layer.R();
  if (R == 0) return cudaError_t{};
  DecodeArgs args{};
  args.x = rows.x, args.S = static_cast<const unsigned char*>(V), args.pitch = rows.pitch;
  args.part[0].row_tile = args.part[0].rows = 0, args.part[0].N = R, args.part[0].y = t;
  args.M = M, args.N = R, args.K = layer.K, args.row_tiles = R / 16, args.slot = kFragmentTile;
  return with_tokens(M, [&](auto nt) {
    constexpr int NT = decltype(nt)::value;
    const Split s = split<Dense<T>, NT, 1>(device, R / 16, ceil_div(layer.K, 64), kFragmentTile, M, 1);
    return run_decode(decode<Dense<T>, NT, 1>, s, Dense<T>::kWarps, args, stream, false);
  });
}

// ---- decode: t, then [S | U], then the sum over splits ------------------------------------------------------------

template <class Layout> size_t decode_workspace(const Layer& layer, int M) {
  return rows_bytes(layer.K, M, Layout::kColumns) + aligned(static_cast<size_t>(M) * layer.R() * 2) +
         aligned(static_cast<size_t>(kMostSplits) * std::min(M, 64) * layer.N() * 4);
}

template <class Layout> cudaError_t decode_layer(const Layer& layer, const Device& device, const Buffers& b, int M, bool f32, cudaStream_t stream) {
  constexpr int T = Layout::kType;
  const int slot = slot_of<Layout>(layer), R = layer.R();
  char* next = static_cast<char*>(b.workspace);
  auto take = [&](size_t bytes) { char* p = next; next += aligned(bytes); return p; };
  const Rows rows = rows_of<T>(layer, b.x, take(rows_bytes(layer.K, M, Layout::kColumns)), M, f32, Layout::kColumns, stream);
  if (rows.error != cudaSuccess) return rows.error;
  uint16_t* const t = reinterpret_cast<uint16_t*>(take(static_cast<size_t>(M) * R * 2));
  const cudaError_t before = run_t<T>(layer, device, rows, b.V, t, M, stream);
  if (before != cudaSuccess) return before;
  const int tiles = ceil_div(layer.K, Layout::kColumns) + ceil_div(layer.most_R(), Layout::kColumns);
  DecodeArgs args{};
  set_parts(args.part, layer, b);
  args.x = rows.x, args.S = static_cast<const unsigned char*>(b.S), args.t = t, args.pitch = rows.pitch;
  args.M = M, args.N = layer.N(), args.K = layer.K, args.R = R, args.row_tiles = layer.row_tiles(), args.slot = slot, args.f32 = f32;
  int splits = 0;
  const cudaError_t error = with_tokens(M, [&](auto nt) {
    constexpr int NT = decltype(nt)::value, RT = std::max(1, std::min(NT / 2, Layout::kWarps));
    const Split s = split<Layout, NT, RT>(device, args.row_tiles, tiles, slot, M, most_splits(M));
    splits = s.splits;
    args.partial = splits > 1 ? reinterpret_cast<float*>(next) : nullptr;
    return run_decode(decode<Layout, NT, RT>, s, Layout::kWarps, args, stream, device.early && R > 0);
  });
  if (error != cudaSuccess || splits == 1) return error;
  ReduceArgs sum{{}, args.partial, splits, M, args.N, f32};
  set_parts(sum.part, layer, b);
  return start(reduce<T>, blocks_for(static_cast<size_t>(M) * args.N), 256, 0, stream, sum, device.early);
}

// ---- prefill: expand S, t, then [X | t] [S | U]ᵀ --------------------------------------------------------------------

template <class Layout> size_t prefill_workspace(const Layer& layer, int M) {
  const size_t dense = static_cast<size_t>(layer.row_tiles()) * ceil_div(layer.K, Layout::kColumns) * Layout::kSteps * kFragmentTile;
  return aligned(dense) + rows_bytes(layer.K, M, 64) + aligned(static_cast<size_t>(M) * layer.R() * 2);
}

template <class Layout> cudaError_t prefill_layer(const Layer& layer, const Device& device, const Buffers& b, int M, bool f32, cudaStream_t stream) {
  constexpr int T = Layout::kType;
  const int tiles = ceil_div(layer.K, Layout::kColumns), slot = slot_of<Layout>(layer), k_steps = ceil_div(layer.K, 64), R = layer.R();
  char* next = static_cast<char*>(b.workspace);
  auto take = [&](size_t bytes) { char* p = next; next += aligned(bytes); return p; };

  // As many CTAs per row of tiles as fill the GPU about twice; a CTA needs no activations, only its rings.
  ExpandArgs e{static_cast<const unsigned char*>(b.S), nullptr, layer.K, slot, 0};
  e.dense = reinterpret_cast<unsigned char*>(take(static_cast<size_t>(layer.row_tiles()) * tiles * Layout::kSteps * kFragmentTile));
  e.tiles_per_split = ceil_div(tiles, std::max(1, std::min(tiles / Layout::kWarps, 4 * device.multiprocessors / layer.row_tiles())));
  cudaError_t error = start(expand<Layout>, dim3(layer.row_tiles(), ceil_div(tiles, e.tiles_per_split)), 32 * Layout::kWarps,
                            ring_bytes<Layout>(slot), stream, e);
  if (error != cudaSuccess) return error;

  const Rows rows = rows_of<T>(layer, b.x, take(rows_bytes(layer.K, M, 64)), M, f32, 64, stream);
  if (rows.error != cudaSuccess) return rows.error;
  uint16_t* const t = reinterpret_cast<uint16_t*>(take(static_cast<size_t>(M) * R * 2));
  error = run_t<T>(layer, device, rows, b.V, t, M, stream);
  Part parts[kMaxParts];
  set_parts(parts, layer, b);
  for (int i = 0; i < layer.parts && error == cudaSuccess; i++) {
    const Part& p = parts[i];
    const unsigned char* const dense = e.dense + static_cast<size_t>(p.row_tile) * tiles * Layout::kSteps * kFragmentTile;
    const GemmArgs s{{rows.x, R > 0 ? t + p.t : nullptr}, {dense, p.U}, {k_steps, p.R / 64}, {k_steps, R / 64},
                     {tiles * Layout::kSteps, p.R / 64}, p.bias, p.y, M, p.N, f32};
    // Tiles of 128 tokens read the weights least often, tiles of 64 fill the GPU sooner.
    const int blocks = ceil_div(p.N, kGemmRows);
    error = blocks * ceil_div(M, 128) >= device.multiprocessors
                ? start(gemm<T, 8>, dim3(ceil_div(M, 128), blocks), 256, gemm_shared(8), stream, s)
                : start(gemm<T, 4>, dim3(ceil_div(M, 64), blocks), 256, gemm_shared(4), stream, s);
  }
  return error;
}

}  // namespace detail

// Bytes of workspace that up to `max_tokens` tokens need, on any supported GPU.
inline size_t workspace_bytes(const Layer& layer, int max_tokens) {
  return detail::with_layout(layer, [&](auto layout) {
    using L = decltype(layout);
    const size_t decode = detail::decode_workspace<L>(layer, std::min(max_tokens, kDecodeTokens));
    return max_tokens <= kDecodeTokens ? decode : std::max(decode, detail::prefill_workspace<L>(layer, max_tokens));
  });
}

// Y = X (S + U V)ᵀ + bias for M >= 1 tokens. `f32`: x and y are f32, else of the layer's type.
inline cudaError_t run_layer(const Layer& layer, const Device& device, const Buffers& b, int M, bool f32, cudaStream_t stream) {
  return detail::with_layout(layer, [&](auto layout) {
    using L = decltype(layout);
    return M <= kDecodeTokens ? detail::decode_layer<L>(layer, device, b, M, f32, stream)
                              : detail::prefill_layer<L>(layer, device, b, M, f32, stream);
  });
}

}  // namespace sslc
