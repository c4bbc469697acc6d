// Which kernels run for a layer and a number of tokens, with what grid, split and workspace. The plugin calls it on a
// CUDA stream, the tests on the CPU emulator: the same decisions.
#pragma once

#include <algorithm>
#include <cstdint>

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
};

struct Buffers {
  const void* x;
  const void *S, *U, *V;
  const float* bias;
  void* y[kMaxParts];  // one per part
  void* workspace;
};

// Up to this many tokens the packed weights are streamed (once per 16 tokens, later passes from L2), beyond it they are
// expanded first. Counted in bytes per weight: a pass reads 1.13, expansion reads 1.13, writes 2 and reads 2 again, so it
// pays from the fifth pass on. Not measured on a GPU.
constexpr int kDecodeTokens = 64;

// Least shared memory of a supported GPU (sm_86, 89, 120). The workspace is sized for it, since an engine may be built
// where there is no GPU: a larger one needs fewer splits, never more.
constexpr int kLeastShared = 99 << 10;
constexpr int kUsualSplits = 8;

struct Split {
  int tiles_per_split, splits, shared_bytes, NT, slices;
};

namespace detail {

inline size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

template <class Layout> int slot_of(const Layer& layer) { return Layout::kTileBytes ? Layout::kTileBytes : layer.slot; }

template <class Layout> int ring_bytes(int slot) { return Layout::kWarps * Layout::kStages * slot; }

// Shared memory of decode(): the rings and [x | t], and afterwards the warps' sums in the same place.
template <class Layout> int decode_shared(int slot, int tiles_per_split, int tokens, int NT) {
  return std::max(ring_bytes<Layout>(slot) + tokens * activation_pitch(tiles_per_split * Layout::kColumns),
                  Layout::kWarps * 512 * NT);
}

// The fewest splits whose activations fit into `shared_bytes`.
template <class Layout> int least_splits(int tiles, int slot, int tokens, int shared_bytes) {
  const int room = (shared_bytes - ring_bytes<Layout>(slot)) / tokens - activation_pitch(0);
  return ceil_div(tiles, std::max(1, room / (2 * Layout::kColumns)));
}

template <class Layout> int split_limit(int tiles, int slot, int tokens) {
  return std::min(tiles, std::max(kUsualSplits, least_splits<Layout>(tiles, slot, tokens, kLeastShared)));
}

// Splits the tiles of [S | U] over CTAs so that the last wave of CTAs is as full as possible. The cost of a wave is its
// tiles per warp plus two for filling the pipeline and the activations; ties go to fewer splits.
template <class Layout> Split split(const Device& device, int row_tiles, int tiles, int slot, int M) {
  const int NT = M <= 8 ? 1 : 2, tokens = std::min(M, 8 * NT), slices = ceil_div(M, 8 * NT);
  const int least = least_splits<Layout>(tiles, slot, tokens, device.shared_bytes);
  Split best{};
  double best_cost = 0;
  for (int wanted = least; wanted <= split_limit<Layout>(tiles, slot, tokens); wanted++) {
    const int per = ceil_div(tiles, wanted), splits = ceil_div(tiles, per);
    const int shared = decode_shared<Layout>(slot, per, tokens, NT);
    const int resident = device.multiprocessors * std::max(1, std::min(device.shared_bytes / shared, 2048 / (32 * Layout::kWarps)));
    const double waves = (static_cast<double>(row_tiles) * splits * slices + resident - 1) / resident;
    const double cost = static_cast<int64_t>(waves) * (ceil_div(per, Layout::kWarps) + 2.0);
    if (best.splits == 0 || cost < best_cost || device.splits == splits) best = {per, splits, shared, NT, slices}, best_cost = cost;
    if (device.splits == splits) break;
  }
  return best;
}

#ifdef __CUDACC__
template <class Args> cudaError_t start(void (*kernel)(Args), dim3 grid, int threads, int shared, cudaStream_t stream, const Args& args) {
  if (shared > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared, stream>>>(args);
  return cudaGetLastError();
}
#else
template <class Args> int start(void (*kernel)(Args), dim3 grid, int threads, int shared, cudaStream_t, const Args& args) {
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

template <class Layout> cudaError_t run_decode(const Split& s, int row_tiles, const DecodeArgs& args, cudaStream_t stream) {
  const dim3 grid(row_tiles, s.splits, s.slices);
  return start(s.NT == 1 ? decode<Layout, 1> : decode<Layout, 2>, grid, 32 * Layout::kWarps, s.shared_bytes, stream, args);
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

// How t = X Vᵀ is split: V is [R, K] in dense tiles, so R / 16 row tiles, and the more CTAs share K.
template <int T> Split split_t(const Layer& layer, const Device& device, int M) {
  return split<Dense<T>>(device, layer.R() / 16, ceil_div(layer.K, 64), kFragmentTile, M);
}

// ---- decode: t, then [S | U], then the sum over splits ------------------------------------------------------------

template <class Layout> size_t decode_workspace(const Layer& layer, int M) {
  const int tiles = ceil_div(layer.K, Layout::kColumns) + ceil_div(layer.most_R(), Layout::kColumns), tokens = std::min(M, 16);
  const size_t limit = split_limit<Layout>(tiles, slot_of<Layout>(layer), tokens);
  const size_t t_limit = layer.R() ? split_limit<Dense<Layout::kType>>(ceil_div(layer.K, 64), kFragmentTile, tokens) : 0;
  return aligned(t_limit * M * layer.R() * 4) + (limit > 1 ? aligned(limit * M * layer.N() * 4) : 0);
}

template <class Layout> cudaError_t decode_layer(const Layer& layer, const Device& device, const Buffers& b, int M, bool f32, cudaStream_t stream) {
  constexpr int T = Layout::kType;
  const int slot = slot_of<Layout>(layer), R = layer.R();
  const bool vector = !f32 && layer.K % 8 == 0 && reinterpret_cast<uintptr_t>(b.x) % 16 == 0;
  float* const t = static_cast<float*>(b.workspace);
  size_t t_bytes = 0;
  int t_splits = 0;
  if (R > 0) {
    const Split s = split_t<T>(layer, device, M);
    DecodeArgs args{};
    args.x = b.x, args.S = static_cast<const unsigned char*>(b.V), args.partial = t;
    args.part[0].row_tile = args.part[0].rows = 0, args.part[0].N = R;
    args.M = M, args.N = R, args.K = layer.K, args.slot = kFragmentTile, args.tiles_per_split = s.tiles_per_split;
    args.f32 = f32, args.vector = vector;
    const cudaError_t error = run_decode<Dense<T>>(s, R / 16, args, stream);
    if (error != cudaSuccess) return error;
    t_splits = s.splits;
    t_bytes = aligned(static_cast<size_t>(t_splits) * M * R * 4);
  }
  const int tiles = ceil_div(layer.K, Layout::kColumns) + ceil_div(layer.most_R(), Layout::kColumns);
  const Split s = split<Layout>(device, layer.row_tiles(), tiles, slot, M);
  DecodeArgs args{};
  set_parts(args.part, layer, b);
  args.x = b.x, args.S = static_cast<const unsigned char*>(b.S), args.t = t;
  args.partial = s.splits > 1 ? reinterpret_cast<float*>(static_cast<char*>(b.workspace) + t_bytes) : nullptr;
  args.M = M, args.N = layer.N(), args.K = layer.K, args.R = R, args.t_splits = t_splits, args.slot = slot;
  args.tiles_per_split = s.tiles_per_split, args.f32 = f32, args.vector = vector;
  const cudaError_t error = run_decode<Layout>(s, layer.row_tiles(), args, stream);
  if (error != cudaSuccess || s.splits == 1) return error;
  ReduceArgs sum{{}, args.partial, s.splits, M, args.N, f32};
  set_parts(sum.part, layer, b);
  return start(reduce<T>, blocks_for(static_cast<size_t>(M) * args.N), 256, 0, stream, sum);
}

// ---- prefill: expand S, t, then [X | t] [S | U]ᵀ --------------------------------------------------------------------

template <class Layout> size_t prefill_workspace(const Layer& layer, int M) {
  const size_t dense = static_cast<size_t>(layer.row_tiles()) * ceil_div(layer.K, Layout::kColumns) * Layout::kSteps * kFragmentTile;
  const size_t x = static_cast<size_t>(M) * ceil_div(layer.K, 64) * 128, t = static_cast<size_t>(M) * layer.R() * 2;
  return aligned(dense) + aligned(x) + aligned(t);
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

  const uint16_t* x = static_cast<const uint16_t*>(b.x);
  if (f32 || layer.K % 64 != 0 || reinterpret_cast<uintptr_t>(b.x) % 16 != 0) {
    const bool vector = !f32 && layer.K % 8 == 0 && reinterpret_cast<uintptr_t>(b.x) % 16 == 0;
    uint16_t* padded = reinterpret_cast<uint16_t*>(take(static_cast<size_t>(M) * k_steps * 128));
    const ConvertArgs c{b.x, padded, M, layer.K, f32, vector};
    error = start(convert<T>, blocks_for(static_cast<size_t>(M) * k_steps * 8), 256, 0, stream, c);
    if (error != cudaSuccess) return error;
    x = padded;
  }

  const dim3 tokens(ceil_div(M, kGemmTokens));
  uint16_t* const t = R > 0 ? reinterpret_cast<uint16_t*>(take(static_cast<size_t>(M) * R * 2)) : nullptr;
  if (R > 0) {
    const GemmArgs v{{x, nullptr}, {static_cast<const unsigned char*>(b.V), nullptr}, {k_steps, 0}, {k_steps, 0}, {k_steps, 0},
                     nullptr, t, M, R, 0};
    error = start(gemm<T>, dim3(tokens.x, ceil_div(R, kGemmRows)), 256, kGemmShared, stream, v);
    if (error != cudaSuccess) return error;
  }
  Part parts[kMaxParts];
  set_parts(parts, layer, b);
  for (int i = 0; i < layer.parts && error == cudaSuccess; i++) {
    const Part& p = parts[i];
    const unsigned char* const dense = e.dense + static_cast<size_t>(p.row_tile) * tiles * Layout::kSteps * kFragmentTile;
    const GemmArgs s{{x, R > 0 ? t + p.t : nullptr}, {dense, p.U}, {k_steps, p.R / 64}, {k_steps, R / 64},
                     {tiles * Layout::kSteps, p.R / 64}, p.bias, p.y, M, p.N, f32};
    error = start(gemm<T>, dim3(tokens.x, ceil_div(p.N, kGemmRows)), 256, kGemmShared, stream, s);
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
