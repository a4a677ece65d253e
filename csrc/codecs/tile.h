// What the codecs of a chain share: a half of a tile, its panels, and planar codes.
#pragma once
#include <cstddef>

#include "../simd.h"
#include "fields.h"

namespace kvs {

constexpr int COLUMNS = 64;  // of one panel
constexpr int MAX_TILE = 128, MAX_DIM = 256;

// The keys or the values of one tile of one KV head, and the chain that writes them.
//
// Rows are float32 [token][head_dim]. Panels are what gemm.h multiplies, [column panel of 64][row][64]; of keys the rows
// are channels and the columns tokens, of values the rows are tokens and the columns channels.
struct HalfTile {
  const KvsHalf& chain;
  bool keys;
  int tokens, head_dim, kv_head;
  int first_position;     // of token 0; the others follow
  int first_counted = 0;  // tokens before it (dense sinks) define no range

  int rows() const { return keys ? head_dim : tokens; }
  int columns() const { return keys ? tokens : head_dim; }
  int elements() const { return tokens * head_dim; }
  // Index of an element in a [row][column] matrix, and in the panels.
  int in_matrix(int token, int channel) const { return keys ? channel * tokens + token : token * head_dim + channel; }
  int in_panels(int token, int channel) const {
    const int row = keys ? channel : token, column = keys ? token : channel;
    return (column / COLUMNS * rows() + row) * COLUMNS + column % COLUMNS;
  }
};

inline int panel_floats(const HalfTile& t) { return (t.columns() + COLUMNS - 1) / COLUMNS * COLUMNS * t.rows(); }

// Buffers for the codes of one half, [row][column].
struct CodeScratch {
  uint8_t codes[MAX_TILE * MAX_DIM], upper[MAX_TILE * MAX_DIM];
};

// Writes the sections of a stage and of those after it; rows: [tokens][head_dim], used up.
void encode_stage(const HalfTile& t, int stage, float* rows, uint8_t* page, CodeScratch& s);
// What a stage and those after it decode to.
void decode_stage(const HalfTile& t, int stage, const uint8_t* page, float* panels);

// A table of this tile's KV head.
inline const float* table_of(const HalfTile& t, const KvsCodec& c, int i) {
  return (const float*)((const uint8_t*)c.tables[i] + t.kv_head * c.table_strides[i]);
}

// Bytes of codes [rows][columns] (rows a multiple of 8, columns of 64 / bits), as `pack_codes` of the reference.
inline void pack_codes(const uint8_t* codes, int rows, int columns, int bits, uint8_t* to) {
  const int planes = 8 / bits, width = planes * LANES;
  for (int block = 0; block < columns; block += width) {
    const bool folded = columns - block < width;
    const int block_rows = folded ? rows / 2 : rows;
    const int lower = folded ? block_rows * columns - width / 2 : 0;  // what moves the right half of the planes
    for (int row = 0; row < block_rows; row += 4, to += 4 * LANES)
      for (int r = 0; r < 4; ++r)
        for (int lane = 0; lane < LANES; ++lane) {
          const uint8_t* from = codes + (row + r) * columns + block + lane;
          uint8_t packed = 0;
          for (int plane = 0; plane < planes; ++plane)
            packed |= uint8_t(from[plane * LANES + (plane < planes / 2 ? 0 : lower)] << (plane * bits));
          to[4 * lane + r] = packed;
        }
  }
}

// Packed codes, read in any order.
template <int BITS>
struct PlanarCodes {
  const uint8_t* base;
  int rows, columns;

  // Words of VL columns from `column` + `lane` on (column a multiple of 16): the code of row `row` + r (row a multiple of
  // 4) is what `code` makes of byte r.
  KVS_INLINE VI quad(int row, int column, int lane) const {
    constexpr int PLANES = 8 / BITS, WIDTH = PLANES * LANES;
    const int block = column / WIDTH;
    const bool folded = columns - block * WIDTH < WIDTH, lower = folded && row >= rows / 2;
    const int plane = column % WIDTH / LANES + (lower ? PLANES / 2 : 0), first = lower ? row - rows / 2 : row;
    return load_words(base + (ptrdiff_t)block * LANES * rows + first * LANES + lane * 4) >>
           (plane * BITS);
  }
  static KVS_INLINE VI code(VI words, int r) { return words >> (8 * r) & ((1 << BITS) - 1); }
};

// 3-bit codes: the low two bits, and the third one.
struct ThreeBitCodes {
  PlanarCodes<2> low;
  PlanarCodes<1> high;
  int rows, columns;

  struct Words {
    VI low, high;
  };
  KVS_INLINE Words quad(int row, int column, int lane) const {
    return {low.quad(row, column, lane), high.quad(row, column, lane)};
  }
  static KVS_INLINE VI code(Words words, int r) {
    return PlanarCodes<2>::code(words.low, r) | PlanarCodes<1>::code(words.high, r) << 2;
  }
};

// Calls emit(row, column, codes) for VL columns at a time, row by row within 16 columns.
template <class Codes, class Emit>
KVS_INLINE void for_codes(const Codes& codes, const Emit& emit) {
  for (int column = 0; column < codes.columns; column += LANES)
    for (int row = 0; row < codes.rows; row += 4)
      for (int lane = 0; lane < LANES; lane += VL) {
        const auto words = codes.quad(row, column, lane);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) emit(row + r, column + lane, Codes::code(words, r));
      }
}

}  // namespace kvs
