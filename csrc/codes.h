// Dot products over packed codes (kvserve/codecs/packing.py), 16 * SUBS columns and H heads at a time, in integers.
//
// A byte holds 8 / BITS codes of one row, one per plane; they are masked in place, so plane k enters as
// code << (BITS * k) and its sum is scaled back at the end. Factors are bounded so that every sum fits int32.
#pragma once
#include "simd.h"

namespace kvs {

// Largest |x| for sums over `rows` rows, boosted rows included.
template <int BITS>
constexpr float factor_limit(int rows) {
  constexpr int largest_entry = BITS == 2 ? 0xc0 : BITS == 4 ? 0xf0 : 0xff;
  const int limit = 0x7fffffff / (largest_entry * rows);
  return limit < 32767 ? float(limit) : 32767.0f;
}

// One matrix of codes, and where its boosted rows have two more bits, those (boost_rows is 0 without them).
struct Codes {
  const uint8_t* base;
  const uint8_t* boost;
  int rows, boost_rows;
};

// Integer factors of the rows for H heads, as store_factors writes them; boost_x is already times 4.
struct Factors {
  const int16_t *x, *boost_x;
  int stride;
};

// acc[h][s] += codes^T x[h] over `rows` rows (a multiple of 4), for VL columns of each of the SUBS planes from
// column first + lane on; `first` is a multiple of 16 * SUBS.
template <int BITS, int H, int SUBS>
KVS_INLINE void accumulate(VI (&acc)[H][SUBS], const uint8_t* codes, int rows, int first, int lane, const int16_t* x,
                           int stride) {
  constexpr int PLANES = 8 / BITS;
  const uint8_t* words[SUBS];
  VI mask[SUBS];
#pragma GCC unroll 4
  for (int s = 0; s < SUBS; ++s) {
    const int plane = first / LANES + s;
    words[s] = codes + int64_t(plane / PLANES) * LANES * rows + lane * 4;
    mask[s] = int32_t(0x00010001u * (((1u << BITS) - 1) << BITS * (plane % PLANES))) - VI{};
  }
  for (int r = 0; r < rows; r += 4) {
    VI even[H], odd[H];  // rows 0 and 2, rows 1 and 3
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      even[h] = broadcast_pair(x + h * stride + r);
      odd[h] = broadcast_pair(x + h * stride + r + 2);
    }
#pragma GCC unroll 4
    for (int s = 0; s < SUBS; ++s) {
      const VI word = load_words(words[BITS == 2 ? 0 : s] + r * LANES);
      const VI low = word & mask[s], high = shift_bytes(word) & mask[s];
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) acc[h][s] = dot2(dot2(acc[h][s], low, even[h]), high, odd[h]);
    }
  }
}

// sums[h][s] = unit * (sum over rows of code * x[h]), for VL columns: first + 16 * s + lane and after.
template <int BITS, int H, int SUBS>
KVS_INLINE void dot_columns(const Codes& c, const Factors& f, int first, int lane, float unit, VF (&sums)[H][SUBS]) {
  VI acc[H][SUBS] = {};
  accumulate<BITS, H, SUBS>(acc, c.base, c.rows, first, lane, f.x, f.stride);
  if (BITS == 2 && c.boost_rows)
    accumulate<2, H, SUBS>(acc, c.boost, c.boost_rows, first, lane, f.boost_x, f.stride);
#pragma GCC unroll 4
  for (int s = 0; s < SUBS; ++s) {
    const int shift = BITS * ((first / LANES + s) % (8 / BITS));
    const float scale = unit / float(1 << shift);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) sums[h][s] = to_float(acc[h][s]) * scale;
  }
}

// The same for a folded half block, which starts at column `first`, and no boosted rows: its upper and its lower rows.
template <int BITS, int H, int SUBS>
KVS_INLINE void dot_folded(const Codes& c, const int16_t* x, int first, int lane, float unit, VF (&sums)[H][SUBS]) {
  const Codes half{c.base + int64_t(first) * BITS / 8 * c.rows, nullptr, c.rows / 2, 0};
  VF lower[H][SUBS];
  dot_columns<BITS, H, SUBS>(half, {x, nullptr, c.rows}, 0, lane, unit, sums);
  dot_columns<BITS, H, SUBS>(half, {x + c.rows / 2, nullptr, c.rows}, LANES * SUBS, lane, unit, lower);
  for (int h = 0; h < H; ++h)
    for (int s = 0; s < SUBS; ++s) sums[h][s] += lower[h][s];
}

}  // namespace kvs
