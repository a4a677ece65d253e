// KVS_TABLE: kvserve/codecs/table.py, operation for operation.
#pragma once
#include <algorithm>

#include "affine.h"

namespace kvs {

// Half ranges and middles, [2][channels] or [2][tokens], and whether they belong to the rows of the matrix of codes.
struct TableRanges {
  float values[2 * MAX_DIM];
  bool of_rows;
  int count;

  const float* half_ranges() const { return values; }
  const float* middles() const { return values + count; }
};

// Calibrated ranges of channels.
inline void load_channel_ranges(const HalfTile& t, const KvsCodec& c, TableRanges& ranges) {
  const float* range = table_of(t, c, 1);
  ranges.of_rows = t.keys;
  ranges.count = t.head_dim;
  for (int d = 0; d < t.head_dim; ++d) ranges.values[d] = std::max(range[d], MIN_SCALE);
  std::copy_n(range + t.head_dim, t.head_dim, ranges.values + t.head_dim);
}

inline void load_ranges(const HalfTile& t, const KvsCodec& c, const uint8_t* page, TableRanges& ranges) {
  if (!has_token_ranges(c)) return load_channel_ranges(t, c, ranges);
  ranges.of_rows = !t.keys;
  ranges.count = t.tokens;
  load_row(ranges.values, page + token_ranges_at(c), 2 * t.tokens, KVS_F16);
}

inline void store_token_ranges(const HalfTile& t, const float* rows, uint16_t* to) {
  for (int token = 0; token < t.tokens; ++token) {
    const auto [low, high] = std::minmax_element(rows + token * t.head_dim, rows + (token + 1) * t.head_dim);
    to[token] = float_to_half_saturated(std::max((*high - *low) * 0.5f, MIN_SCALE));
    to[t.tokens + token] = float_to_half_saturated((*high + *low) * 0.5f);
  }
}

// Places of VL elements among `count` ascending borders.
KVS_INLINE VI places_of(VF x, const float* borders, int count) {
  VI place{};
  for (int i = 0; i < count; ++i) place -= x > borders[i];  // true is -1
  return place;
}

inline void encode_table(const HalfTile& t, int stage, float* rows, uint8_t* page, CodeScratch& s) {
  const KvsCodec& c = t.chain.stage[stage];
  const int bits = bits_of(c), borders_count = (1 << bits) - 1;
  if (has_token_ranges(c)) store_token_ranges(t, rows, (uint16_t*)(page + token_ranges_at(c)));
  TableRanges ranges;
  load_ranges(t, c, page, ranges);
  const float *levels = table_of(t, c, 0), *half_ranges = ranges.half_ranges(), *middles = ranges.middles();
  float borders[15];
  for (int i = 0; i < borders_count; ++i) borders[i] = (levels[i + 1] + levels[i]) * 0.5f;
  for (int token = 0; token < t.tokens; ++token)
    for (int d = 0; d < t.head_dim; d += VL) {
      const bool by_token = has_token_ranges(c);
      const VF half = by_token ? splat(half_ranges[token]) : loadu(half_ranges + d);
      const VF middle = by_token ? splat(middles[token]) : loadu(middles + d);
      const VF x = (loadu(rows + token * t.head_dim + d) - middle) * (1.0f / half);
      const VI place = places_of(x, borders, borders_count);
      for (int i = 0; i < VL; ++i) s.codes[t.in_matrix(token, d + i)] = uint8_t(place[i]);
    }
  if (bits == 3)
    for (int i = 0; i < t.elements(); ++i) s.upper[i] = s.codes[i] >> 2, s.codes[i] &= 3;
  pack_codes(s.codes, t.rows(), t.columns(), bits & ~1, page + codes_at(c));
  if (bits == 3) pack_codes(s.upper, t.rows(), t.columns(), 1, page + high_codes_at(c));
}

// Codes [rows][columns] to level * half range + middle.
template <int BITS, class Codes>
inline void decode_levels(const Codes& codes, const float* levels, const TableRanges& ranges, float* out) {
  const LookUp<BITS> level(levels);
  const float *half = ranges.half_ranges(), *middle = ranges.middles();
  const int rows = codes.rows;
  const auto place = [&](int row, int column) {
    return out + ((ptrdiff_t)(column / COLUMNS) * rows + row) * COLUMNS + column % COLUMNS;
  };
  if (ranges.of_rows)
    for_codes(codes, [&](int row, int column, VI code) {
      storeu(place(row, column), level(code) * half[row] + middle[row]);
    });
  else
    for_codes(codes, [&](int row, int column, VI code) {
      storeu(place(row, column), level(code) * loadu(half + column) + loadu(middle + column));
    });
}

inline void decode_table(const HalfTile& t, int stage, const uint8_t* page, float* panels) {
  const KvsCodec& c = t.chain.stage[stage];
  const float* levels = table_of(t, c, 0);
  const uint8_t* codes = page + codes_at(c);
  TableRanges ranges;
  load_ranges(t, c, page, ranges);
  const int rows = t.rows(), columns = t.columns();
  if (bits_of(c) == 2) return decode_levels<2>(PlanarCodes<2>{codes, rows, columns}, levels, ranges, panels);
  if (bits_of(c) == 4) return decode_levels<4>(PlanarCodes<4>{codes, rows, columns}, levels, ranges, panels);
  const ThreeBitCodes both{{codes, rows, columns}, {page + high_codes_at(c), rows, columns}, rows, columns};
  decode_levels<3>(both, levels, ranges, panels);
}

}  // namespace kvs
