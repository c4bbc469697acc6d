// Y = X (S + U V)ᵀ + bias.
//
//   decode   few tokens: streams the packed weights once and multiplies as it decodes. The low-rank part is no epilogue:
//            [S | U] is one matrix with K + R columns, [X | t] its input, and the same accumulators take both.
//            With the layout Dense it is also the kernel for t = X Vᵀ, which runs beside the first part of the other.
//   reduce   adds the partial sums of split-K in a fixed order: the same bits every time.
//   expand   many tokens: writes S once as a dense matrix in fragment order ...
//   gemm     ... which this multiplies, again with U as a K-extension.
//   convert  activations that cannot be read 16 bytes at a time (f32, or rows that are no whole tiles) to padded 16-bit rows.
//
// One call may compute several layers of the same input (q, k and v; gate and up). They are its parts: one after the
// other in S, U, V and bias, each with its rows padded to 16 and its rank to 64, and with an output of its own.
//
// Accumulation is in f32. Activations in f32 are rounded to the weights' 16-bit type on the way into the mma; the output
// is written from the f32 accumulators. N, K and the rank may be anything: weights are padded with zeros when they are
// packed, and activations are filled with zeros here, since a padding weight times whatever lies behind a row is not 0
// when that is NaN.
#pragma once

#include "layouts.cuh"

namespace sslc {

SSLC_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
SSLC_HOST_DEVICE constexpr int least(int a, int b) { return a < b ? a : b; }

// ---- the pipeline of tiles -----------------------------------------------------------------------------------------

// One warp's private ring of tiles in shared memory, filled by asynchronous copies kStages - 1 tiles ahead. Because it
// is private, a __syncwarp per tile is the only barrier in the main loop.
template <class Layout, int Stride> struct Ring {
  const unsigned char* weights;  // all tiles
  const int32_t* offsets;        // where this warp's next tile starts and ends, in 16 bytes (layouts with a table only)
  unsigned char* ring;
  int slot_bytes, lane, left, start, end, filled = 0, read = 0;

  // Tiles first, first + Stride, ... < last of row tile `row`, which has `row_tiles` tiles.
  SSLC_DEVICE Ring(const unsigned char* S, unsigned char* shared, int slot, size_t row, int row_tiles, int first, int last)
      : weights(S), offsets(nullptr), ring(shared), slot_bytes(slot), lane(threadIdx.x % 32), start(0), end(0) {
    left = last > first ? ceil_div(last - first, Stride) : 0;
    if constexpr (Layout::kTileBytes == 0) {
      offsets = reinterpret_cast<const int32_t*>(S) + row * row_tiles + first;
      if (left > 0) start = offsets[0], end = offsets[1];
    } else {
      weights += (row * row_tiles + first) * Layout::kTileBytes;
    }
  }

  // Starts the copy of the next tile, if there is one. Every call commits one group, so that counting groups in
  // wait_copies counts tiles, also past the end.
  SSLC_DEVICE void issue() {
    if (left > 0) {
      left--;
      unsigned char* to = ring + filled;
      filled = after(filled);
      if constexpr (Layout::kTileBytes == 0) {
        const unsigned char* from = weights + static_cast<size_t>(start) * 16;
        const int chunks = end - start;
        SSLC_UNROLL for (int c = 0; c < 96; c += 32)  // up to 1536 bytes: enough for most tiles at half density
          if (c + lane < chunks) copy16_async(to + (c + lane) * 16, from + (c + lane) * 16);
        if (chunks > 96) {
          SSLC_NO_UNROLL for (int c = 96 + lane; c < chunks; c += 32) copy16_async(to + c * 16, from + c * 16);
        }
        // The next tile's place is read one tile ahead: its latency hides behind this tile's arithmetic.
        offsets += Stride;
        if (left > 0) start = offsets[0], end = offsets[1];
      } else {
        constexpr int kChunks = Layout::kTileBytes / 16;
        SSLC_UNROLL for (int c = 0; c < kChunks; c += 32)
          if (c + 32 <= kChunks || c + lane < kChunks) copy16_async(to + (c + lane) * 16, weights + (c + lane) * 16);
        weights += static_cast<size_t>(Stride) * Layout::kTileBytes;
      }
    }
    commit_copies();
  }

  // The slot behind the one at `at`.
  SSLC_DEVICE int after(int at) const {
    const int slot = Layout::kTileBytes ? Layout::kTileBytes : slot_bytes;  // a constant where it can be
    return at + slot == Layout::kStages * slot ? 0 : at + slot;
  }

  SSLC_DEVICE void fill() {
    SSLC_UNROLL for (int i = 0; i < Layout::kStages - 1; i++) issue();
  }

  // The oldest tile, ready to read; and refills the slot of the tile before it.
  SSLC_DEVICE const unsigned char* next() {
    wait_copies<Layout::kStages - 2>();
    __syncwarp();  // the other lanes' copies have landed too; and all lanes are done with the slot that is refilled
    issue();
    const unsigned char* at = ring + read;
    read = after(read);
    return at;
  }
};

// ---- activations ---------------------------------------------------------------------------------------------------

template <int T> SSLC_DEVICE uint32_t pack2(float a, float b) {
  return from_float<T>(a) | static_cast<uint32_t>(from_float<T>(b)) << 16;
}

// Columns k .. k + 7 of one row as 16-bit floats, zeros past the end. `vector`: rows are whole multiples of 16 bytes.
template <int T> SSLC_DEVICE uint4 load8(const void* x, size_t row, int k, int K, bool f32, bool vector) {
  if (vector && k + 8 <= K) return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x) + row * K + k);
  uint32_t word[4] = {0, 0, 0, 0};
  SSLC_UNROLL for (int i = 0; i < 8; i++) {
    if (k + i < K) {
      const size_t at = row * K + k + i;
      const uint32_t bits = f32 ? from_float<T>(static_cast<const float*>(x)[at]) : static_cast<const uint16_t*>(x)[at];
      word[i / 2] |= bits << (16 * (i & 1));
    }
  }
  return {word[0], word[1], word[2], word[3]};
}

template <int T> SSLC_DEVICE void store_output(void* y, size_t at, float value, bool f32) {
  if (f32) static_cast<float*>(y)[at] = value;
  else static_cast<uint16_t*>(y)[at] = from_float<T>(value);
}

// c[16 rows x 8 tokens][n] += one step of 16 rows x 64 columns; x[2 n], x[2 n + 1] are the lane's 16 columns of its token.
// The sums take turns: each depends on its last.
template <int T, int Count>
SSLC_DEVICE void multiply_step(float (*c)[4], const uint32_t* low, const uint32_t* high, const uint4* x) {
  SSLC_UNROLL for (int n = 0; n < Count; n++) mma<T>(c[n], low[0], high[0], low[1], high[1], x[2 * n].x, x[2 * n].y);
  SSLC_UNROLL for (int n = 0; n < Count; n++) mma<T>(c[n], low[2], high[2], low[3], high[3], x[2 * n].z, x[2 * n].w);
  SSLC_UNROLL for (int n = 0; n < Count; n++) mma<T>(c[n], low[4], high[4], low[5], high[5], x[2 * n + 1].x, x[2 * n + 1].y);
  SSLC_UNROLL for (int n = 0; n < Count; n++) mma<T>(c[n], low[6], high[6], low[7], high[7], x[2 * n + 1].z, x[2 * n + 1].w);
}

// ---- decode --------------------------------------------------------------------------------------------------------

constexpr int kMaxParts = 3, kNoPart = 0x7fffffff;

// One of the layers that a call computes. Those that are not there have `row_tile` and `rows` kNoPart.
struct Part {
  int row_tile = kNoPart;     // its first row tile
  int rows = kNoPart;         // outputs of the parts before it
  int N = 0, R = 0;           // outputs; the rank, rounded up to 64
  int t = 0;                  // its first column of t
  const unsigned char* U = nullptr;  // [ceil(N / 16)][R / 64] fragment tiles
  const float* bias = nullptr;       // [N], or null
  void* y = nullptr;                 // [M, N]
};

// The part that `at` belongs to, where `start` says where each begins. No dynamic index: that would copy the kernel's
// arguments to local memory.
template <class At, class Start> SSLC_DEVICE Part part_of(const Part (&parts)[kMaxParts], At at, Start start) {
  Part p = parts[0];
  SSLC_UNROLL for (int i = 1; i < kMaxParts; i++)
    if (at >= start(parts[i])) p = parts[i];
  return p;
}

struct DecodeArgs {
  Part part[kMaxParts];
  const uint16_t* x;       // [M, pitch], 16 bits; a multiple of the layout's columns, and zero from K on
  const unsigned char* S;  // packed weights of all row tiles
  const uint16_t* t;       // [M, R]: X Vᵀ of all parts
  float* partial;          // [gridDim.y, the parts' M * N], or null when there is one split
  int M, N, K, R;          // N and R: of all parts
  int pitch, row_tiles;
  int slot;                // bytes of a ring slot
  int tiles_per_split;     // tiles of [S | U] columns that one CTA takes
  int f32;                 // y is f32
};

// Grid (row tiles / RT, splits, slices of 8 * NT tokens), block 32 * kWarps: each warp has one of RT row tiles, and of its
// columns every kShare-th tile. Slices of the same rows run side by side, so the second and later ones find the weights
// in L2. X comes through the L1 cache: nothing is staged, and no warp waits for another before the end.
//
// At least 512 threads per multiprocessor: saying so lets ptxas use up to 128 registers. Left alone, it aims at more
// threads and spills on sm_86 and sm_89.
template <class Layout, int NT, int RT>
__global__ void __launch_bounds__(32 * Layout::kWarps, 512 / (32 * Layout::kWarps)) decode(DecodeArgs a) {
  constexpr int T = Layout::kType, W = Layout::kWarps, kThreads = 32 * W, kColumns = Layout::kColumns;
  constexpr int kShare = W / RT;
  constexpr int kTogether = least(NT, 2);  // of the NT groups of 8 tokens, how many are in registers at once
  SSLC_DYNAMIC_SHARED(shared);
  let_next_kernel_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto part_here = [&a, warp] {
    const unsigned tile = compute_anew(blockIdx.x) * RT + warp % RT;
    return part_of(a.part, tile, [](const Part& p) { return static_cast<unsigned>(p.row_tile); });
  };

  // This split's share of the tiles of [S | U]: first .. last, of which those below `sparse` belong to S. A part of lower
  // rank than another's may have none left for the last splits: first >= last, and its sums are zero.
  const int row_tile = blockIdx.x * RT + warp % RT, sparse = ceil_div(a.K, kColumns);
  const int first = blockIdx.y * a.tiles_per_split;
  const int all = row_tile < a.row_tiles ? sparse + ceil_div(part_here().R, kColumns) : 0;
  const int last = least(first + a.tiles_per_split, all);
  const int token0 = blockIdx.z * 8 * NT, tokens = least(a.M - token0, 8 * NT);

  Ring<Layout, kShare> ring(a.S, shared + warp * Layout::kStages * a.slot, a.slot, row_tile, sparse, first + warp / RT,
                            least(last, sparse));
  ring.fill();

  // Lane (g, t) multiplies with token g of each 8. Columns of the mma past the last token repeat it: the same address,
  // and a result that nobody stores.
  int token[NT];
  SSLC_UNROLL for (int j = 0; j < NT; j++) token[j] = token0 + least(lane / 4 + 8 * j, tokens - 1);

  float c[NT][4];
  SSLC_UNROLL for (int j = 0; j < NT; j++) SSLC_UNROLL for (int i = 0; i < 4; i++) c[j][i] = 0;

  const uint16_t* x = a.x + (first + warp / RT) * kColumns + lane % 4 * (kColumns / 4);
  const auto load = [&](uint4* to, int j0, int step) {
    SSLC_UNROLL for (int j = 0; j < kTogether; j++) {
      const uint4* const at = reinterpret_cast<const uint4*>(x + static_cast<size_t>(token[j0 + j]) * a.pitch + 16 * step);
      to[2 * j] = at[0], to[2 * j + 1] = at[1];
    }
  };
  SSLC_NO_UNROLL for (int tile = first + warp / RT; tile < least(last, sparse); tile += kShare) {
    uint4 now[2 * kTogether];
    load(now, 0, 0);  // under way while the weights are decoded
    Layout::tile(ring.next(), lane, [&](int step, const uint32_t* low, const uint32_t* high, float low_scale, float high_scale) {
      SSLC_UNROLL for (int j = 0; j < NT; j += kTogether) {
        if (step > 0 || j > 0) load(now, j, step);
        if constexpr (Layout::kScaled) {
          // All 64 columns of a row share one scale, so it multiplies the sum: exact products, 4 operations.
          float d[kTogether][4] = {};
          multiply_step<T, kTogether>(d, low, high, now);
          SSLC_UNROLL for (int i = 0; i < kTogether; i++) {
            c[j + i][0] += low_scale * d[i][0], c[j + i][1] += low_scale * d[i][1];
            c[j + i][2] += high_scale * d[i][2], c[j + i][3] += high_scale * d[i][3];
          }
        } else {
          multiply_step<T, kTogether>(c + j, low, high, now);
        }
      }
    });
    x += kShare * kColumns;
  }

  // The low-rank columns: U straight from global memory, one 16-byte load per fragment; and t, which is ready by now.
  wait_for_kernel_before();
  const Part part = part_here();
  const int rank0 = first > sparse ? first - sparse : 0;
  const int steps = least((last - sparse) * Layout::kSteps, part.R / 64);
  const unsigned char* const U = part.U + static_cast<size_t>(row_tile - part.row_tile) * (part.R / 64) * kFragmentTile;
  SSLC_NO_UNROLL for (int step = rank0 * Layout::kSteps + warp / RT; step < steps; step += kShare) {
    uint32_t low[8], high[8];
    Dense<T>::load(U + static_cast<size_t>(step) * kFragmentTile, lane, low, high);
    SSLC_UNROLL for (int j = 0; j < NT; j += kTogether) {
      uint4 now[2 * kTogether];
      SSLC_UNROLL for (int i = 0; i < kTogether; i++) {
        const uint16_t* const at = a.t + static_cast<size_t>(token[j + i]) * a.R + part.t + step * 64 + lane % 4 * 16;
        now[2 * i] = load16_past_l1(at), now[2 * i + 1] = load16_past_l1(at + 8);
      }
      multiply_step<T, kTogether>(c + j, low, high, now);
    }
  }

  // Add the sums of the warps of each row tile, in order.
  __syncthreads();  // the sums reuse the memory of the rings
  float* const sums = reinterpret_cast<float*>(shared);
  SSLC_UNROLL for (int j = 0; j < NT; j++)
    SSLC_UNROLL for (int i = 0; i < 4; i++) sums[((warp * NT + j) * 32 + lane) * 4 + i] = c[j][i];
  __syncthreads();
  for (int o = threadIdx.x; o < RT * 128 * NT; o += kThreads) {
    const int row = o % 16, m = o / 16 % (8 * NT), tile = o / (128 * NT);
    const int from = row % 8 * 4 + m % 8 / 2, i = row / 8 * 2 + m % 2;
    float sum = 0;
    SSLC_UNROLL for (int s = 0; s < kShare; s++) sum += sums[(((s * RT + tile) * NT + m / 8) * 32 + from) * 4 + i];
    const unsigned here = blockIdx.x * RT + tile;
    const Part p = part_of(a.part, here, [](const Part& q) { return static_cast<unsigned>(q.row_tile); });
    const int n = (here - p.row_tile) * 16 + row;
    if (m < tokens && n < p.N) {
      const size_t at = static_cast<size_t>(token0 + m) * p.N + n;
      if (a.partial) a.partial[(static_cast<size_t>(blockIdx.y) * a.N + p.rows) * a.M + at] = sum;
      else store_output<T>(p.y, at, p.bias ? sum + p.bias[n] : sum, a.f32);
    }
  }
}

struct ReduceArgs {
  Part part[kMaxParts];
  const float* partial;  // [splits, the parts' M * N]
  int splits, M, N, f32;
};

// Grid ceil(M * N / 256), block 256.
template <int T> __global__ void __launch_bounds__(256) reduce(ReduceArgs a) {
  wait_for_kernel_before();
  const size_t size = static_cast<size_t>(a.M) * a.N, i = static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int s = 0; s < a.splits; s++) sum += a.partial[s * size + i];
  const size_t M = a.M;
  const Part part = part_of(a.part, i, [M](const Part& p) { return M * p.rows; });
  const size_t at = i - M * part.rows;
  store_output<T>(part.y, at, part.bias ? sum + part.bias[at % part.N] : sum, a.f32);
}

// ---- prefill -------------------------------------------------------------------------------------------------------

struct ExpandArgs {
  const unsigned char* S;
  unsigned char* dense;  // [row tiles][tiles * kSteps] fragment tiles
  int K, slot, tiles_per_split;
};

template <int T> SSLC_DEVICE uint4 scaled4(const uint32_t* w, float scale) {
  uint32_t o[4];
  SSLC_UNROLL for (int i = 0; i < 4; i++) o[i] = pack2<T>(to_float<T>(w[i] & 0xffff) * scale, to_float<T>(w[i] >> 16) * scale);
  return {o[0], o[1], o[2], o[3]};
}

// Grid (row tiles, splits), block 32 * kWarps. S to dense tiles in fragment order; int8 values are rounded to 16 bits here.
template <class Layout> __global__ void __launch_bounds__(32 * Layout::kWarps) expand(ExpandArgs a) {
  constexpr int T = Layout::kType, W = Layout::kWarps;
  SSLC_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = ceil_div(a.K, Layout::kColumns);
  const int first = blockIdx.y * a.tiles_per_split, last = least(first + a.tiles_per_split, tiles);
  Ring<Layout, W> ring(a.S, shared + warp * Layout::kStages * a.slot, a.slot, blockIdx.x, tiles, first + warp, last);
  ring.fill();
  SSLC_NO_UNROLL for (int tile = first + warp; tile < last; tile += W) {
    unsigned char* const row = a.dense + (static_cast<size_t>(blockIdx.x) * tiles + tile) * Layout::kSteps * kFragmentTile;
    Layout::tile(ring.next(), lane, [&](int step, const uint32_t* low, const uint32_t* high, float low_scale, float high_scale) {
      int block, as_lane;
      Layout::dense(step, lane, block, as_lane);
      uint4* const to = reinterpret_cast<uint4*>(row + block * kFragmentTile) + as_lane;
      if constexpr (Layout::kScaled) {
        to[0] = scaled4<T>(low, low_scale), to[32] = scaled4<T>(low + 4, low_scale);
        to[64] = scaled4<T>(high, high_scale), to[96] = scaled4<T>(high + 4, high_scale);
      } else {
        to[0] = {low[0], low[1], low[2], low[3]}, to[32] = {low[4], low[5], low[6], low[7]};
        to[64] = {high[0], high[1], high[2], high[3]}, to[96] = {high[4], high[5], high[6], high[7]};
      }
    });
  }
}

struct ConvertArgs {
  const void* x;  // [M, K]
  uint16_t* to;   // [M, pitch]
  int M, K, pitch, f32, vector;
};

// Grid ceil(M * pitch / 8 / 256), block 256: eight columns per thread.
template <int T> __global__ void __launch_bounds__(256) convert(ConvertArgs a) {
  const int chunks = a.pitch / 8;
  const size_t i = static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x, m = i / chunks;
  if (m >= static_cast<size_t>(a.M)) return;
  reinterpret_cast<uint4*>(a.to)[i] = load8<T>(a.x, m, static_cast<int>(i % chunks) * 8, a.K, a.f32, a.vector);
}

struct GemmArgs {
  // Two segments of columns: 64 * steps of [X | t] [M, 64 * pitch], and [S | U] as fragment tiles [row tiles][stride].
  const uint16_t* x[2];
  const unsigned char* w[2];
  int steps[2], pitch[2], stride[2];
  const float* bias;  // [N], or null
  void* y;            // [M, N]
  int M, N, f32;
};

constexpr int kGemmRows = 256, kGemmStages = 4;
SSLC_HOST_DEVICE constexpr int gemm_stage(int NT) { return kGemmRows * 64 + NT * 16 * 64; }
SSLC_HOST_DEVICE constexpr int gemm_shared(int NT) { return kGemmStages * gemm_stage(NT); }

// Grid (ceil(M / (16 NT)), ceil(N / 256)), block 256. 8 warps, each 64 rows of W x 8 NT tokens; 32 columns per stage: of
// each lane's 16 columns of a fragment tile the first 8, then the last 8. So a row tile's share of a stage is two of the
// fragment tile's four runs of 512 bytes, and a token's is every second 16 bytes of 128.
template <int T, int NT> __global__ void __launch_bounds__(256, NT == 8 ? 1 : 2) gemm(GemmArgs a) {
  constexpr int kTokens = 16 * NT, kStage = gemm_stage(NT);
  SSLC_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int token0 = blockIdx.x * kTokens, row_tile0 = blockIdx.y * (kGemmRows / 16);
  const int row_tiles = ceil_div(a.N, 16), stages = 2 * (a.steps[0] + a.steps[1]);

  // Rows past the end repeat the last one: valid memory, results that nobody stores.
  auto issue = [&](int stage) {
    if (stage < stages) {
      unsigned char* const to = shared + stage % kGemmStages * kStage;
      // Plain selections, not a.w[segment]: indexing kernel arguments would copy them to local memory.
      const int step = stage / 2, half = stage % 2;
      const bool low_rank = step >= a.steps[0];
      const int k = low_rank ? step - a.steps[0] : step, pitch = low_rank ? a.pitch[1] : a.pitch[0];
      const int stride = low_rank ? a.stride[1] : a.stride[0];
      const unsigned char* const w = low_rank ? a.w[1] : a.w[0];
      const uint16_t* const x = low_rank ? a.x[1] : a.x[0];
      SSLC_UNROLL for (int i = 0; i < kGemmRows * 4 / 256; i++) {
        const int chunk = threadIdx.x + 256 * i, tile = least(row_tile0 + chunk / 64, row_tiles - 1);
        const int run = chunk / 32 % 2 * 2 + half;  // row g, row g + 8
        copy16_async(to + chunk * 16, w + (static_cast<size_t>(tile) * stride + k) * kFragmentTile + run * 512 + chunk % 32 * 16);
      }
      SSLC_UNROLL for (int i = 0; i < kTokens * 4 / 256; i++) {
        const int chunk = threadIdx.x + 256 * i, m = least(token0 + chunk / 4, a.M - 1);
        copy16_async(to + kGemmRows * 64 + chunk * 16, x + (static_cast<size_t>(m) * pitch + k) * 64 + chunk % 4 * 16 + half * 8);
      }
    }
    commit_copies();
  };

  float acc[4][NT][4];
  SSLC_UNROLL for (int i = 0; i < 4; i++) SSLC_UNROLL for (int j = 0; j < NT; j++) SSLC_UNROLL for (int q = 0; q < 4; q++) acc[i][j][q] = 0;

  SSLC_UNROLL for (int i = 0; i < kGemmStages - 1; i++) issue(i);
  SSLC_NO_UNROLL for (int stage = 0; stage < stages; stage++) {
    wait_copies<kGemmStages - 2>();
    __syncthreads();  // everyone's copies have landed, and everyone is done with the stage that is refilled
    issue(stage + kGemmStages - 1);
    const unsigned char* const at = shared + stage % kGemmStages * kStage;
    const uint4* const w = reinterpret_cast<const uint4*>(at + warp / 2 * 4 * 1024) + lane;
    const uint4* const x = reinterpret_cast<const uint4*>(at + kGemmRows * 64) + (warp % 2 * 8 * NT + g) * 4 + t;
    uint4 b[NT];
    SSLC_UNROLL for (int j = 0; j < NT; j++) b[j] = x[j * 32];
    SSLC_UNROLL for (int i = 0; i < 4; i++) {
      const uint4 low = w[i * 64], high = w[i * 64 + 32];
      SSLC_UNROLL for (int j = 0; j < NT; j++) mma<T>(acc[i][j], low.x, high.x, low.y, high.y, b[j].x, b[j].y);
      SSLC_UNROLL for (int j = 0; j < NT; j++) mma<T>(acc[i][j], low.z, high.z, low.w, high.w, b[j].z, b[j].w);
    }
  }

  SSLC_UNROLL for (int i = 0; i < 4; i++) SSLC_UNROLL for (int j = 0; j < NT; j++) SSLC_UNROLL for (int q = 0; q < 4; q++) {
    const int n = (row_tile0 + warp / 2 * 4 + i) * 16 + g + q / 2 * 8, m = token0 + warp % 2 * 8 * NT + j * 8 + t * 2 + q % 2;
    if (m < a.M && n < a.N)
      store_output<T>(a.y, static_cast<size_t>(m) * a.N + n, a.bias ? acc[i][j][q] + a.bias[n] : acc[i][j][q], a.f32);
  }
}

}  // namespace sslc
