// Dot products over packed codes (kvserve/pages/reference.py), 32 columns and H heads at a time, in integers.
//
// A byte of a word holds 8 / BITS codes; they are masked in place, so plane k of a byte enters as code << (BITS * k) and
// its sum is scaled back at the end. Factors are bounded so that every sum fits int32.
#pragma once
#include "simd.h"

namespace kvs {

constexpr int COLUMNS = 32;  // of one call: four planes of 8

template <int BITS>
constexpr float plane_scale(int plane) {
  return BITS == 8 ? 1.0f : 1.0f / float(1 << (BITS * (plane % (8 / BITS))));
}

// Largest |x| for sums over `rows` rows, boosted rows included.
template <int BITS>
constexpr float factor_limit(int rows) {
  constexpr int largest_entry = BITS == 2 ? 0xc0 : BITS == 4 ? 0xf0 : 0xff;
  const int limit = 0x7fffffff / (largest_entry * rows);
  return limit < 32767 ? float(limit) : 32767.0f;
}

// Words of the first row pair of 32-column block `block`.
template <int BITS>
KVS_INLINE const uint8_t* block_words(const uint8_t* codes, int rows, int block) {
  return codes + int64_t(block) * COLUMNS * BITS / 128 * (rows * 16);  // 2-bit blocks share words in twos
}

template <int BITS, bool HIGH>
KVS_INLINE WV plane_codes(WV low, WV high, int plane) {
  constexpr uint16_t mask = (1 << BITS) - 1;
  if constexpr (BITS == 2) return (HIGH ? low >> 8 : low) & uint16_t(mask << (2 * plane));
  if constexpr (BITS == 4) return (plane < 2 ? low : low >> 8) & uint16_t(mask << (4 * (plane % 2)));
  const WV words = plane < 2 ? low : high;
  return plane % 2 ? words >> 8 : words & mask;
}

// acc[h][plane] += codes^T x[h] over `rows` rows (a multiple of 4). HIGH: the upper byte of 2-bit words.
// x: int16 rows of x_stride elements.
template <int BITS, int H, bool HIGH>
KVS_INLINE void accumulate(IV (&acc)[H][4], const uint8_t* words, int rows, const int16_t* x, int x_stride) {
  const uint8_t* next = words + rows * 16;  // the second column block of 8-bit codes
  for (int r = 0; r < rows; r += 2 * ROW_PAIRS) {
    const WV low = load_words(words + r * 16);
    const WV high = BITS == 8 ? load_words(next + r * 16) : low;
    WV factors[H];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) factors[h] = broadcast_rows(x + h * x_stride + r);
#pragma GCC unroll 4
    for (int plane = 0; plane < 4; ++plane) {
      const WV codes = plane_codes<BITS, HIGH>(low, high, plane);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) acc[h][plane] = dot_add(acc[h][plane], codes, factors[h]);
    }
  }
}

// One matrix of codes, and where its boosted rows have two more bits, those (rows is 0 without them).
struct Codes {
  const uint8_t* base;
  const uint8_t* boost;
  int rows, boost_rows;
};

// Integer factors of the rows for H heads; boost_x is already times 4.
struct Factors {
  const int16_t *x, *boost_x;
  int stride, boost_stride;
};

template <int BITS, int H, bool HIGH>
KVS_INLINE void dot_half(const Codes& c, const Factors& f, int block, V8 (&sums)[H][4]) {
  IV acc[H][4] = {};
  accumulate<BITS, H, HIGH>(acc, block_words<BITS>(c.base, c.rows, block), c.rows, f.x, f.stride);
  if (BITS == 2 && c.boost_rows)
    accumulate<2, H, HIGH>(acc, block_words<2>(c.boost, c.boost_rows, block), c.boost_rows, f.boost_x, f.boost_stride);
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
    for (int plane = 0; plane < 4; ++plane) sums[h][plane] = column_sums(acc[h][plane]) * plane_scale<BITS>(plane);
}

// sums[h][column] = sum over rows of code * x[h], for the 32 columns of `block`.
template <int BITS, int H>
KVS_INLINE void dot_columns(const Codes& c, const Factors& f, int block, V8 (&sums)[H][4]) {
  if (BITS == 2 && block % 2)
    dot_half<BITS, H, true>(c, f, block, sums);
  else
    dot_half<BITS, H, false>(c, f, block, sums);
}

}  // namespace kvs
