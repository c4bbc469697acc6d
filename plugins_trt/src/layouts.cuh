// How the weights lie in memory, and how a lane turns its bytes into mma operands without asking any other lane.
//
// One step is 16 rows x 64 columns of W: four mma.m16n8k16. The order of k inside an mma is free as long as both
// operands agree, so lane (g, t) = (lane / 4, lane % 4) takes 16 whole columns of rows g and g + 8, four per mma. That
// choice is what makes decoding cheap: the mask bits and values that a lane needs are its own; and the activations that it
// multiplies are 32 bytes of a row of X, as it lies in memory.
//
// Each layout is a struct with
//   kColumns      columns per tile (a tile is 16 rows high), kSteps = kColumns / 64. In step s, lane column t multiplies
//                 columns t * kColumns / 4 + 16 s ...
//   kTileBytes    bytes per tile; 0 when tiles differ in size (a table of offsets stands in front of them then)
//   tile(...)     decodes one tile: calls use(step, low, high, low_scale, high_scale) per step, where low[0..7] holds
//                 this lane's 16 columns of row g as pairs of 16-bit floats, high[0..7] those of row g + 8
//   dense(...)    where that step's columns belong in the dense tile of kernels.cuh's expand()
//
// plugins_trt/pack.py writes these bytes and is the other half of every comment here.
#pragma once

#include "device.cuh"

namespace sslc {

constexpr int kFragmentTile = 2048;  // bytes of a dense 16 x 64 tile in fragment order

// ---- from byte planes to floats ------------------------------------------------------------------------------------

// Up to 8 values as planes of bytes: l0, l1 = their low bytes, h0, h1 = their high bytes. One permute then picks any 4
// of the 8, so expansion needs neither a dynamic register index nor a popcount nor a gather from shared memory.
// 8-bit values have one plane only.
struct Planes {
  uint32_t l0, l1, h0, h1;
};

// Four signed bytes to four 16-bit floats, exactly (every int8 is a half and a bfloat16).
template <int T> SSLC_DEVICE void bytes_to_floats(uint32_t bytes, uint32_t& first, uint32_t& second) {
  const uint32_t biased = bytes ^ 0x80808080u;  // q + 128
  if constexpr (T == kF16) {
    // 0x6400 | b is the half 1024 + b: one permute makes two of them, one subtraction removes 1024 + 128.
    first = subtract_half2(permute(biased, 0x64646464u, 0x4140), 0x64806480u);
    second = subtract_half2(permute(biased, 0x64646464u, 0x4342), 0x64806480u);
  } else {
    // bfloat16 has too few mantissa bits for that; a float has enough (2^23 + b), and its upper half is a bfloat16.
    uint32_t wide[4];
    SSLC_UNROLL for (int i = 0; i < 4; i++) {
      const uint32_t bits = permute(biased, 0x4b000000u, 0x7650u | static_cast<uint32_t>(i));
      float value;
      memcpy(&value, &bits, 4);
      value -= 8388736.0f;  // 2^23 + 128
      memcpy(&wide[i], &value, 4);
    }
    first = permute(wide[0], wide[1], 0x7632);
    second = permute(wide[2], wide[3], 0x7632);
  }
}

// Four columns: nibble i of `select` is the slot whose value column i has.
template <int T, bool Int8>
SSLC_DEVICE void expand4(const Planes& v, uint32_t select, uint32_t& first, uint32_t& second) {
  const uint32_t low = permute(v.l0, v.l1, select);
  if constexpr (Int8) {
    bytes_to_floats<T>(low, first, second);
  } else {
    const uint32_t high = permute(v.h0, v.h1, select);
    first = permute(low, high, 0x5140);
    second = permute(low, high, 0x7362);
  }
}

// Masks of `any` and `fixed8`: bit 4 * i + u of a lane's word says that column i (0..7) of unit u is stored; unit
// u = 2 * (row >= 8) + (upper 8 of the 16 columns). So (word >> u) & 0x11111111 has one bit per nibble, and times
// 0x11111110 it is the exclusive prefix sum per nibble, that is the slot of each column: a selector for permute.
SSLC_DEVICE uint32_t unit_bits(uint32_t word, int u) { return (word >> u) & 0x11111111u; }

template <class Half> SSLC_DEVICE float scale_at(const unsigned char* scales, int row) {
  return to_float<kF16>(reinterpret_cast<const Half*>(scales)[row]);
}

// ---- dense ---------------------------------------------------------------------------------------------------------

// Fragment order: [4][32 lanes][16 bytes] = (row g: columns 0..7, 8..15 of the lane's 16; row g + 8: the same).
// V and U are stored so, and S is expanded to it for long prefills.
template <int T> struct Dense {
  static constexpr int kType = T, kColumns = 64, kSteps = 1, kTileBytes = kFragmentTile, kWarps = 8, kStages = 4;
  static constexpr bool kScaled = false;

  SSLC_DEVICE static void load(const unsigned char* tile, int lane, uint32_t* low, uint32_t* high) {
    const uint4* p = reinterpret_cast<const uint4*>(tile) + lane;
    const uint4 q0 = p[0], q1 = p[32], q2 = p[64], q3 = p[96];
    low[0] = q0.x, low[1] = q0.y, low[2] = q0.z, low[3] = q0.w, low[4] = q1.x, low[5] = q1.y, low[6] = q1.z, low[7] = q1.w;
    high[0] = q2.x, high[1] = q2.y, high[2] = q2.z, high[3] = q2.w;
    high[4] = q3.x, high[5] = q3.y, high[6] = q3.z, high[7] = q3.w;
  }

  template <class Use> SSLC_DEVICE static void tile(const unsigned char* tile, int lane, Use use) {
    uint32_t low[8], high[8];
    load(tile, lane, low, high);
    use(0, low, high, 1.0f, 1.0f);
  }

};

// ---- fixed8: at most 8 stored in each aligned 16 columns of a row ---------------------------------------------------

// Tile: rows g: [32 lanes][planes], rows g + 8: the same, [32] mask words, and for int8 16 half-precision scales (one per
// row and 64 columns). 1.125 bytes per weight with 16-bit values, 0.656 with int8. No address depends on the mask.
template <int T, bool Int8> struct Fixed8 {
  static constexpr int kType = T, kColumns = 64, kSteps = 1, kWarps = 8, kStages = Int8 ? 8 : 6;
  static constexpr bool kScaled = Int8;
  static constexpr int kPlanes = Int8 ? 8 : 16, kMasks = 64 * kPlanes, kScales = kMasks + 128;
  static constexpr int kTileBytes = kScales + (Int8 ? 32 : 0);

  SSLC_DEVICE static Planes planes(const unsigned char* at) {
    if constexpr (Int8) {
      const uint2 q = *reinterpret_cast<const uint2*>(at);
      return {q.x, q.y, 0, 0};
    } else {
      const uint4 q = *reinterpret_cast<const uint4*>(at);
      return {q.x, q.y, q.z, q.w};
    }
  }

  // One (row, 16 columns) group: 8 slots shared by two units of 8 columns. A dropped column needs a slot that reads 0.
  //  unit 0: slot 7. It can hold a value of unit 0 only if all 8 of its columns are stored, and then none is dropped.
  //  unit 1: slot 0, which pack.py gives to unit 0 (a stored zero, if need be) unless unit 1 has all 8.
  SSLC_DEVICE static void expand16(Planes v, uint32_t bits0, uint32_t bits1, uint32_t* out) {
    const uint32_t before0 = bits0 * 0x11111110u, through0 = before0 + bits0, count0 = through0 >> 28;
    const uint32_t before1 = bits1 * 0x11111110u + count0 * 0x11111111u;
    const uint32_t full0 = static_cast<uint32_t>(static_cast<int32_t>(through0) >> 31);  // count0 == 8: all ones
    const uint32_t select0 = before0 | (0x77777777u & ~(bits0 * 7u)), select1 = before1 & (bits1 * 7u);

    Planes u = v;
    u.l1 &= 0x00ffffffu | full0;
    if constexpr (!Int8) u.h1 &= 0x00ffffffu | full0;
    expand4<T, Int8>(u, select0, out[0], out[1]);
    expand4<T, Int8>(u, select0 >> 16, out[2], out[3]);

    const uint32_t keep0 = 0xffffff00u | ((count0 - 1) >> 24);  // count0 == 0: slot 0 is unit 1's own
    v.l0 &= keep0;
    if constexpr (!Int8) v.h0 &= keep0;
    expand4<T, Int8>(v, select1, out[4], out[5]);
    expand4<T, Int8>(v, select1 >> 16, out[6], out[7]);
  }

  template <class Use> SSLC_DEVICE static void tile(const unsigned char* tile, int lane, Use use) {
    const uint32_t mask = *reinterpret_cast<const uint32_t*>(tile + kMasks + lane * 4);
    const Planes a = planes(tile + lane * kPlanes), b = planes(tile + 32 * kPlanes + lane * kPlanes);
    uint32_t low[8], high[8];
    expand16(a, unit_bits(mask, 0), unit_bits(mask, 1), low);
    expand16(b, unit_bits(mask, 2), unit_bits(mask, 3), high);
    if constexpr (Int8)
      use(0, low, high, scale_at<uint16_t>(tile + kScales, lane / 4), scale_at<uint16_t>(tile + kScales, lane / 4 + 8));
    else use(0, low, high, 1.0f, 1.0f);
  }

  SSLC_DEVICE static void dense(int step, int lane, int& block, int& as_lane) { block = step, as_lane = lane; }
};

// ---- any: any mask at all ------------------------------------------------------------------------------------------

// Tile: [32] mask words, start[4], for int8 16 half-precision scales, then the values of unit 0..3, each lane 0..31 without
// gaps: four to an 8-byte pair of planes (int8: to a 4-byte word). One packed warp scan per tile (byte u = lane's count
// in unit u) gives every lane its start in all four units at once, so no prefix is stored. Tiles are padded to 16
// bytes and found by a table of offsets. About 2 * density + 0.16 bytes per weight.
template <int T, bool Int8> struct Any {
  static constexpr int kType = T, kColumns = 64, kSteps = 1, kTileBytes = 0, kWarps = 8, kStages = 4;
  static constexpr bool kScaled = Int8;
  static constexpr int kStarts = 128, kScales = 144;

  template <class Use> SSLC_DEVICE static void tile(const unsigned char* tile, int lane, Use use) {
    const uint32_t mask = *reinterpret_cast<const uint32_t*>(tile + lane * 4);
    const uint4 start = *reinterpret_cast<const uint4*>(tile + kStarts);
    uint32_t bits[4], before[4], through[4], out[4][4];
    SSLC_UNROLL for (int u = 0; u < 4; u++) {
      bits[u] = unit_bits(mask, u), before[u] = bits[u] * 0x11111110u, through[u] = before[u] + bits[u];
    }
    // The top nibble of `through` is the unit's count; gather the four of them into the bytes of one word.
    uint32_t counts = permute(permute(through[0], through[1], 0x4473), permute(through[2], through[3], 0x4473), 0x5410);
    counts = counts >> 4 & 0x0f0f0f0fu;
    uint32_t sum = counts;
    SSLC_UNROLL for (int distance = 1; distance < 32; distance *= 2) sum = add_from_lane_below(sum, distance, lane);
    sum -= counts;  // exclusive: at most 31 * 8 = 248 per byte

    SSLC_UNROLL for (int u = 0; u < 4; u++) {
      const uint32_t at = sum >> (8 * u) & 255u, base = u == 0 ? start.x : u == 1 ? start.y : u == 2 ? start.z : start.w;
      const uint32_t shift = at * 8;  // the funnel shift takes it modulo 32: at % 4 bytes
      // No dropped column exists if all 8 are stored; else slot 7 is blanked and dropped columns read it.
      const uint32_t full = static_cast<uint32_t>(static_cast<int32_t>(through[u]) >> 31) | 0x00ffffffu;
      const uint32_t select = before[u] | (0x77777777u & ~(bits[u] * 7u));
      Planes v;
      if constexpr (Int8) {
        const uint32_t* w = reinterpret_cast<const uint32_t*>(tile + base + (at & ~3u));
        v = {funnel_right(w[0], w[1], shift), funnel_right(w[1], w[2], shift) & full, 0, 0};
      } else {
        const uint2* w = reinterpret_cast<const uint2*>(tile + base + (at & ~3u) * 2);
        const uint2 w0 = w[0], w1 = w[1], w2 = w[2];
        v = {funnel_right(w0.x, w1.x, shift), funnel_right(w1.x, w2.x, shift) & full, funnel_right(w0.y, w1.y, shift),
             funnel_right(w1.y, w2.y, shift) & full};
      }
      expand4<T, Int8>(v, select, out[u][0], out[u][1]);
      expand4<T, Int8>(v, select >> 16, out[u][2], out[u][3]);
    }
    uint32_t low[8], high[8];
    SSLC_UNROLL for (int i = 0; i < 4; i++) {
      low[i] = out[0][i], low[4 + i] = out[1][i], high[i] = out[2][i], high[4 + i] = out[3][i];
    }
    if constexpr (Int8)
      use(0, low, high, scale_at<uint16_t>(tile + kScales, lane / 4), scale_at<uint16_t>(tile + kScales, lane / 4 + 8));
    else use(0, low, high, 1.0f, 1.0f);
  }

  SSLC_DEVICE static void dense(int step, int lane, int& block, int& as_lane) { block = step, as_lane = lane; }
};

// ---- bank32: at most 32 stored in each aligned 64 columns of a row --------------------------------------------------

// Tile: 16 rows x 256 columns; lane (g, t) owns columns 64 t .. 64 t + 63 of rows g and g + 8. Word j of lane l lies at
// (32 j + l) * 4: its low half is the j-th stored value of row g, its high half that of row g + 8. A lane only ever reads
// its own shared-memory bank, so 2-byte gathers never conflict, and a running pointer is the prefix sum. Then
// [4 steps][32 lanes] mask words (16 bits row g, 16 bits row g + 8). 1.125 bytes per weight.
template <int T> struct Bank32 {
  static constexpr int kType = T, kColumns = 256, kSteps = 4, kWarps = 4, kStages = 3;
  static constexpr bool kScaled = false;
  static constexpr int kCap = 32, kMasks = 128 * kCap, kTileBytes = kMasks + 512;

  template <class Use> SSLC_DEVICE static void tile(const unsigned char* tile, int lane, Use use) {
    const unsigned char *low_next = tile + lane * 4, *high_next = low_next + 2, *masks = tile + kMasks + lane * 4;
    SSLC_UNROLL for (int step = 0; step < 4; step++) {
      const uint32_t mask = *reinterpret_cast<const uint32_t*>(masks + step * 128);
      uint32_t low[8], high[8];
      SSLC_UNROLL for (int pair = 0; pair < 8; pair++) {
        low[pair] = take_pair(low_next, mask >> (2 * pair));
        high[pair] = take_pair(high_next, mask >> (16 + 2 * pair));
      }
      use(step, low, high, 1.0f, 1.0f);
    }
  }

  // Plain `if`s compile to predicated loads and adds; the same in inline PTX cost extra moves (counted, nvcc 13.0).
  SSLC_DEVICE static uint32_t take_pair(const unsigned char*& next, uint32_t bits) {
    uint32_t first = 0, second = 0;
    if (bits & 1) first = *reinterpret_cast<const uint16_t*>(next), next += 128;
    if (bits & 2) second = *reinterpret_cast<const uint16_t*>(next), next += 128;
    return permute(first, second, 0x5410);
  }

  SSLC_DEVICE static void dense(int step, int lane, int& block, int& as_lane) {
    block = lane % 4, as_lane = lane / 4 * 4 + step;
  }
};

}  // namespace sslc
