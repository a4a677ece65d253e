// From the codes of a sealed page to the A fragments of mma.m16n8k16, by shifts and masks alone.
//
// The page layout (kvserve/codecs/packing.py) already is a fragment order. A 32-bit word holds, for one of the 16
// columns of each plane, four consecutive rows, one per byte. Let lane (g, t) of the warp load the words of columns 2g
// and 2g + 1 of row quad 4s + t. In product number s, over the rows [16s, 16s + 16) of a tile of 16 columns, number
// both so that
//   row g of A is column 2g of the tile, row g + 8 is column 2g + 1;
//   columns 2t, 2t + 1 of A are rows 4t, 4t + 2 of the 16 rows, columns 2t + 8, 2t + 9 are rows 4t + 1, 4t + 3.
// Then every code that the lane has loaded is one that it must hold, and no lane needs another's. Both numberings are
// harmless: the order of the rows is that of a sum, and B is loaded in the same order; the order of the columns is
// undone where results are used. For K, rows are channels and columns tokens, for V the reverse: the tokens 2g, 2g + 1
// and 4t..4t + 3 of a tile that weights are computed and used for are the same numbering twice (softmax.h).
#pragma once
#include "lanes.h"

namespace kvs::gpu {

constexpr int TILE = 16;  // columns of a plane, and rows that one mma sums over
constexpr int CHUNK = 64;  // tokens of one step of the running softmax
constexpr int TILES = CHUNK / TILE;
constexpr int QUAD_BYTES = 64;  // one row quad of one column block

// Two words of one row quad, columns 2g and 2g + 1; or four consecutive 16-bit numbers.
struct alignas(8) Words {
  uint32_t first, second;
};

// Where the byte `offset` of a page's codes lies in shared memory. Row quads whose number differs by two would meet in
// the same banks: half of them trade their two halves. Multiples of 256 may be added before or after.
KVS_LANE int placed(int offset) { return offset ^ (offset >> 2 & 32); }

KVS_LANE Words load_words(const uint8_t* at) { return *reinterpret_cast<const Words*>(at); }
KVS_LANE uint32_t load_word(const uint8_t* at) { return *reinterpret_cast<const uint32_t*>(at); }

// An A fragment of one number, to sum the rows of B.
template <class Number>
struct Constant {
  uint32_t a[4];
  explicit KVS_LANE Constant(float x) {
    for (uint32_t& pair : a) pair = Number::pack(x, x);
  }
};

// A b-bit code in the mantissa bits [p, p + b) of a power of two 2^(M - p), M the bits of the mantissa, is the number
// 2^(M - p) + code, exactly. The sum over rows of the first term is taken off again in float32.
template <class Number, int BITS>
struct Codes {
  static constexpr int PLANES = 8 / BITS;
  static constexpr int BLOCK_COLUMNS = PLANES * TILE;
  static constexpr float MIDDLE = 0.5f * ((1 << BITS) - 1);

  // Lowest mantissa bit of a plane's codes: planes that fit beside each other share a shift.
  static constexpr KVS_LANE int position(int plane) {
    constexpr int room = Number::MANTISSA - 8, top = Number::MANTISSA - BITS;
    const int beside = plane * BITS + (room > 0 ? room : 0);
    return beside < top ? beside : top;
  }
  // What is added to the codes of a plane.
  static constexpr KVS_LANE float base(int plane) { return float(1 << (Number::MANTISSA - position(plane))); }

  // Rows 0 and 2 (odd: 1 and 3) of a word, each 2^log_unit * (base + code).
  static KVS_LANE uint32_t pair(uint32_t word, int plane, bool odd, int log_unit) {
    const int at = position(plane), shift = plane * BITS + (odd ? 8 : 0) - at;
    const uint32_t mask = ((1u << BITS) - 1) << at;
    const uint32_t power = uint32_t(Number::BIAS + Number::MANTISSA - at + log_unit) << Number::MANTISSA;
    const uint32_t moved = shift >= 0 ? word >> shift : word << -shift;
    return and_or(moved, mask * 0x10001u, power * 0x10001u);
  }
  static KVS_LANE void fragment(uint32_t (&a)[4], Words words, int plane, int log_unit = 0) {
    a[0] = pair(words.first, plane, false, log_unit);
    a[1] = pair(words.second, plane, false, log_unit);
    a[2] = pair(words.first, plane, true, log_unit);
    a[3] = pair(words.second, plane, true, log_unit);
  }
};

}  // namespace kvs::gpu
