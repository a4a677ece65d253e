// KVS_BEFORE_ROPE: kvserve/codecs/before_rope.py, operation for operation.
#pragma once
#include "tile.h"

namespace kvs {

// Pair i turns the channels first(i) and second(i) by the angle whose cosine and sine stand in row i of the table.
struct Rotary {
  const float *cosines, *sines;  // [pair][position], from the tile's first position on
  int pairs, positions, step, apart;

  int first(int i) const { return i * step; }
  int second(int i) const { return i * step + apart; }
  const float* cosines_of(int i) const { return cosines + (ptrdiff_t)i * positions; }
  const float* sines_of(int i) const { return sines + (ptrdiff_t)i * positions; }
};

inline Rotary rotary_of(const HalfTile& t, const KvsCodec& c) {
  const float* table = table_of(t, c, 0) + t.first_position;
  const int pairs = rotary_dim_of(c) / 2, positions = positions_of(c);
  const bool interleaved = is_interleaved(c);
  return {table, table + (ptrdiff_t)pairs * positions, pairs, positions, interleaved ? 2 : 1, interleaved ? 1 : pairs};
}

inline void encode_before_rope(const HalfTile& t, int stage, float* rows, uint8_t* page, CodeScratch& s) {
  const Rotary rotary = rotary_of(t, t.chain.stage[stage]);
  for (int i = 0; i < rotary.pairs; ++i)
    for (int token = 0; token < t.tokens; token += VL) {
      float *first = rows + token * t.head_dim + rotary.first(i), *second = rows + token * t.head_dim + rotary.second(i);
      VF x, y;
      for (int j = 0; j < VL; ++j) x[j] = first[j * t.head_dim], y[j] = second[j * t.head_dim];
      const VF cosine = loadu(rotary.cosines_of(i) + token), sine = loadu(rotary.sines_of(i) + token);
      const VF squares = rounded(cosine * cosine) + rounded(sine * sine);
      const VF a = (rounded(x * cosine) + rounded(y * sine)) / squares;
      const VF b = (rounded(y * cosine) - rounded(x * sine)) / squares;
      for (int j = 0; j < VL; ++j) first[j * t.head_dim] = a[j], second[j * t.head_dim] = b[j];
    }
  encode_stage(t, stage + 1, rows, page, s);
}

inline void decode_before_rope(const HalfTile& t, int stage, const uint8_t* page, float* panels) {
  const Rotary rotary = rotary_of(t, t.chain.stage[stage]);
  decode_stage(t, stage + 1, page, panels);
  for (int token = 0; token < t.tokens; token += COLUMNS)
    for (int i = 0; i < rotary.pairs; ++i) {
      float *first = panels + t.in_panels(token, rotary.first(i)), *second = panels + t.in_panels(token, rotary.second(i));
      for (int column = 0; column < COLUMNS; column += VL) {
        const VF cosine = loadu(rotary.cosines_of(i) + token + column);
        const VF sine = loadu(rotary.sines_of(i) + token + column);
        const VF x = loadu(first + column), y = loadu(second + column);
        storeu(first + column, x * cosine - y * sine);
        storeu(second + column, y * cosine + x * sine);
      }
    }
}

}  // namespace kvs
