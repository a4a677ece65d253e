// KVS_VECTOR: kvserve/codecs/vector.py, operation for operation.
#pragma once
#include "panels.h"
#include "tile.h"

namespace kvs {

constexpr int CENTROIDS = 256, MAX_COUPLE = 8;

// The nearest of the centroids, [couple][256] in `turned`, to `couple` elements; ties: the first one.
template <int COUPLE>
KVS_INLINE int nearest_centroid(const float* x, const float* turned) {
  VI first;
  for (int i = 0; i < VL; ++i) first[i] = i;
  VF least = splat(-NEG_INF);
  VI found = first;
  for (int k = 0; k < CENTROIDS; k += VL) {
    VF distance{};
#pragma GCC unroll 8
    for (int i = 0; i < COUPLE; ++i) {
      const VF apart = x[i] - loadu(turned + i * CENTROIDS + k);
      distance += rounded(apart * apart);
    }
    const VI nearer = distance < least;
    least = nearer ? distance : least;
    found = nearer ? first + k : found;
  }
  int best = 0;
  for (int i = 1; i < VL; ++i)
    if (least[i] < least[best] || (least[i] == least[best] && found[i] < found[best])) best = i;
  return found[best];
}

template <int COUPLE>
inline void encode_couples(const HalfTile& t, const float* book, const float* rows, uint8_t* codes) {
  const int couples = t.head_dim / COUPLE;
  float turned[COUPLE * CENTROIDS];
  for (int j = 0; j < couples; ++j, book += CENTROIDS * COUPLE) {
    for (int k = 0; k < CENTROIDS; ++k)
      for (int i = 0; i < COUPLE; ++i) turned[i * CENTROIDS + k] = book[k * COUPLE + i];
    for (int token = 0; token < t.tokens; ++token)
      codes[token * couples + j] = uint8_t(nearest_centroid<COUPLE>(rows + token * t.head_dim + j * COUPLE, turned));
  }
}

inline void encode_vector(const HalfTile& t, int stage, float* rows, uint8_t* page, CodeScratch&) {
  const KvsCodec& c = t.chain.stage[stage];
  const float* book = table_of(t, c, 0);
  uint8_t* codes = page + codes_at(c);
  if (couple_of(c) == 2) return encode_couples<2>(t, book, rows, codes);
  if (couple_of(c) == 4) return encode_couples<4>(t, book, rows, codes);
  encode_couples<8>(t, book, rows, codes);
}

// Copies the centroids of `count` tokens and the channels [channel, channel + width) to rows `stride` floats apart. One
// codebook at a time, since it fills a good part of the first-level cache.
template <int COUPLE>
KVS_INLINE void copy_centroids(const HalfTile& t, const float* book, const uint8_t* codes, int token, int count,
                               int channel, int width, float* to, int stride) {
  const int couples = t.head_dim / COUPLE;
  for (int j = channel / COUPLE; j < (channel + width) / COUPLE; ++j, to += COUPLE) {
    const float* own = book + (ptrdiff_t)j * CENTROIDS * COUPLE;
    const uint8_t* code = codes + token * couples + j;
    for (int i = 0; i < count; ++i, code += couples) memcpy(to + i * stride, own + *code * COUPLE, COUPLE * sizeof(float));
  }
}

template <int COUPLE>
inline void decode_couples(const HalfTile& t, const float* book, const uint8_t* codes, float* panels) {
  if (!t.keys) {
    for (int d = 0; d < t.head_dim; d += COLUMNS)
      copy_centroids<COUPLE>(t, book, codes, 0, t.tokens, d, std::min(COLUMNS, t.head_dim - d),
                             panels + t.in_panels(0, d), COLUMNS);
    return;
  }
  constexpr int CHANNELS = VL > MAX_COUPLE ? VL : MAX_COUPLE;
  alignas(64) float rows[COLUMNS * CHANNELS];
  for (int token = 0; token < t.tokens; token += COLUMNS)
    for (int d = 0; d < t.head_dim; d += CHANNELS) {
      copy_centroids<COUPLE>(t, book, codes, token, COLUMNS, d, CHANNELS, rows, CHANNELS);
      float* panel = panels + t.in_panels(token, d);
      for (int column = 0; column < COLUMNS; column += VL)
        for (int i = 0; i < CHANNELS; i += VL)
          transpose_block(rows + column * CHANNELS + i, CHANNELS, panel + i * COLUMNS + column, COLUMNS);
    }
}

inline void decode_vector(const HalfTile& t, int stage, const uint8_t* page, float* panels) {
  const KvsCodec& c = t.chain.stage[stage];
  const float* book = table_of(t, c, 0);
  const uint8_t* codes = page + codes_at(c);
  if (couple_of(c) == 2) return decode_couples<2>(t, book, codes, panels);
  if (couple_of(c) == 4) return decode_couples<4>(t, book, codes, panels);
  decode_couples<8>(t, book, codes, panels);
}

}  // namespace kvs
