// KVS_AFFINE and KVS_SYMMETRIC: kvserve/codecs/affine.py and symmetric.py, operation for operation.
#pragma once
#include <algorithm>
#include <cmath>

#include "tile.h"

namespace kvs {

constexpr float MIN_SCALE = 0x1p-20f;
constexpr int MAX_SCALES = 2 * MAX_TILE / 32 * MAX_DIM;  // groups have 32 tokens or channels at least

// A stored affine code: value = code * scale + low, both as their float16 bits say.
struct Range {
  uint16_t scale, low;
};

// clip: what both ends are multiplied by.
inline Range range_of(float low, float high, int bits, float clip = 1.0f) {
  const float scale = (high - low) * clip / float((1 << bits) - 1);
  return {float_to_half_saturated(std::max(scale, MIN_SCALE)), float_to_half_saturated(low * clip)};
}

// Codes of n values that lie `stride` apart, to places that lie STEP (0: `step`) apart.
template <int STEP>
inline void affine_codes(const float* x, int stride, int n, Range range, int bits, uint8_t* to, int step) {
  const float low = half_to_float(range.low), inverse = 1.0f / half_to_float(range.scale), top = (1 << bits) - 1;
  for (int i = 0; i < n; ++i) {
    const float scaled = (x[i * stride] - low) * inverse;
    to[i * (STEP ? STEP : step)] = uint8_t(std::nearbyint(std::min(std::max(scaled, 0.0f), top)));
  }
}

// Smallest and largest of each channel over the counted tokens [first, last); 0 and 0 where there are none.
inline void channel_ranges(const float* rows, int head_dim, int first, int last, float* low, float* high) {
  for (int d = 0; d < head_dim; d += VL) {
    VF lo = splat(-NEG_INF), hi = splat(NEG_INF);
    for (int t = first; t < last; ++t) {
      const VF x = loadu(rows + t * head_dim + d);
      lo = vmin(lo, x);
      hi = vmax(hi, x);
    }
    storeu(low + d, first < last ? lo : VF{});
    storeu(high + d, first < last ? hi : VF{});
  }
}

// The channels with the widest range over the counted tokens; ties: the lower one. index: ascending.
inline void pick_boosted(const HalfTile& t, const KvsCodec& c, const float* rows, uint8_t* index) {
  float low[MAX_DIM], spread[MAX_DIM];
  uint8_t order[MAX_DIM];
  channel_ranges(rows, t.head_dim, t.first_counted, t.tokens, low, spread);
  for (int d = 0; d < t.head_dim; ++d) {
    spread[d] -= low[d];
    order[d] = uint8_t(d);
  }
  std::stable_sort(order, order + t.head_dim, [&](uint8_t x, uint8_t y) { return spread[x] > spread[y]; });
  std::sort(order, order + boosted_of(c));
  std::copy(order, order + boosted_of(c), index);
}

// One scale for each channel and group of tokens.
template <bool KEYS>
inline void encode_by_channel(const HalfTile& t, const KvsCodec& c, const float* rows, uint8_t* page, CodeScratch& s) {
  const int tokens = t.tokens, dim = t.head_dim, group = group_of(c, dim), boosted = boosted_of(c);
  uint8_t* index = page + boost_index_at(c);
  int8_t boost_row[MAX_DIM + 1];
  std::fill(boost_row, boost_row + dim, int8_t(-1));
  if (boosted) pick_boosted(t, c, rows, index);
  for (int r = 0; r < boosted; ++r) boost_row[index[r]] = int8_t(r);
  for (int first = 0; first < tokens; first += group) {
    float low[MAX_DIM], high[MAX_DIM];
    channel_ranges(rows, dim, std::max(first, std::min(t.first_counted, first + group)), first + group, low, high);
    uint16_t* scales = (uint16_t*)(page + scales_at(c)) + first / group * 2 * dim;
    for (int d = 0; d < dim; ++d) {
      const int bits = boost_row[d] < 0 ? bits_of(c) : 4;
      const Range range = range_of(low[d], high[d], bits);
      uint8_t* codes = s.codes + (KEYS ? d * tokens + first : first * dim + d);
      affine_codes<KEYS ? 1 : 0>(rows + first * dim + d, dim, group, range, bits, codes, dim);
      scales[d] = range.scale;
      scales[dim + d] = range.low;
      if (!KEYS || boost_row[d] < 0) continue;
      uint8_t* boost = s.upper + boost_row[d] * tokens + first;
      for (int i = 0; i < group; ++i) {
        boost[i] = codes[i] >> 2;
        codes[i] &= 3;
      }
    }
  }
  pack_codes(s.codes, t.rows(), t.columns(), bits_of(c), page + codes_at(c));
  if (boosted) pack_codes(s.upper, boosted, tokens, 2, page + boost_codes_at(c));
}

// Symmetric mid-rise codes of one rotated row; returns the scale (see `quantise_symmetric` of the reference).
inline float symmetric_codes(const float* x, int n, int bits, uint8_t* to) {
  const float step = bits == 2 ? 0.9957f : bits == 4 ? 0.3352f : 0.0308f, half_top = 0.5f * ((1 << bits) - 1);
  double squares = 0;
  for (int i = 0; i < n; ++i) squares += double(x[i]) * x[i];
  float scale = std::max(float(std::sqrt(squares / n)) * step, MIN_SCALE);
  for (int pass = 0; pass < 2; ++pass) {
    const float inverse = 1.0f / scale;
    float dot = 0, norm = 0;
    for (int i = 0; i < n; ++i) {
      const float code = std::nearbyint(std::min(std::max(x[i] * inverse + half_top, 0.0f), 2 * half_top));
      to[i] = uint8_t(code);
      dot += x[i] * (code - half_top);
      norm += (code - half_top) * (code - half_top);
    }
    scale = std::max(dot / norm, MIN_SCALE);
  }
  return scale;
}

// One scale for each token and group of channels.
template <bool KEYS>
inline void encode_by_token(const HalfTile& t, const KvsCodec& c, const float* rows, uint8_t* page, CodeScratch& s) {
  const int tokens = t.tokens, dim = t.head_dim, group = group_of(c, dim);
  const float* clips = is_clipped(c) ? table_of(t, c, 0) : nullptr;
  uint16_t* scales = (uint16_t*)(page + scales_at(c));
  for (int token = 0; token < tokens; ++token) {
    const float* x = rows + token * dim;
    uint8_t* codes = s.codes + (KEYS ? token : token * dim);
    for (int first = 0; first < dim; first += group) {
      const auto [low, high] = std::minmax_element(x + first, x + first + group);
      const Range range = range_of(*low, *high, bits_of(c), clips ? clips[first / group] : 1.0f);
      affine_codes<KEYS ? 0 : 1>(x + first, 1, group, range, bits_of(c), codes + (KEYS ? first * tokens : first), tokens);
      scales[first / group * 2 * tokens + token] = range.scale;
      scales[(first / group * 2 + 1) * tokens + token] = range.low;
    }
  }
  pack_codes(s.codes, t.rows(), t.columns(), bits_of(c), page + codes_at(c));
}

inline void encode_affine(const HalfTile& t, int stage, float* rows, uint8_t* page, CodeScratch& s) {
  const KvsCodec& c = t.chain.stage[stage];
  if (axis_of(c) == BY_CHANNEL)
    return t.keys ? encode_by_channel<true>(t, c, rows, page, s) : encode_by_channel<false>(t, c, rows, page, s);
  t.keys ? encode_by_token<true>(t, c, rows, page, s) : encode_by_token<false>(t, c, rows, page, s);
}

inline void encode_symmetric(const HalfTile& t, int stage, float* rows, uint8_t* page, CodeScratch& s) {
  const KvsCodec& c = t.chain.stage[stage];
  uint16_t* scales = (uint16_t*)(page + scales_at(c));
  for (int i = 0; i < t.tokens; ++i)
    scales[i] = float_to_half_saturated(
        symmetric_codes(rows + i * t.head_dim, t.head_dim, bits_of(c), s.codes + i * t.head_dim));
  pack_codes(s.codes, t.tokens, t.head_dim, bits_of(c), page + codes_at(c));
}

// Codes [rows][columns] to code * scale + low. `scales` is [columns / group][scale, low][rows].
template <int bits>
inline void decode_matrix(const uint8_t* codes, int rows, int columns, int group, const float* scales, float* out) {
  constexpr int planes = 8 / bits, mask = (1 << bits) - 1, width = planes * LANES;
  for (int block = 0; block < columns; block += width) {
    const bool folded = columns - block < width;  // its right half are the lower rows of its left half
    const int block_rows = folded ? rows / 2 : rows;
    const float* plane_scales[planes];
    float* panels[planes];
    for (int plane = 0; plane < planes; ++plane) {
      const bool lower = folded && plane >= planes / 2;
      const int first_row = lower ? block_rows : 0, column = block + plane * LANES - (lower ? width / 2 : 0);
      plane_scales[plane] = scales + (ptrdiff_t)(column / group) * 2 * rows + first_row;
      panels[plane] = out + ((ptrdiff_t)(column / COLUMNS) * rows + first_row) * COLUMNS + column % COLUMNS;
    }
    for (int row = 0; row < block_rows; row += 4)
      for (int lane = 0; lane < LANES; lane += VL, codes += 4 * VL) {
        const VI words = load_words(codes);
#pragma GCC unroll 4
        for (int plane = 0; plane < planes; ++plane)
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) {
            const float* at = plane_scales[plane] + row + r;
            const VF x = to_float(words >> (8 * r + plane * bits) & mask) * at[0] + at[rows];
            storeu(panels[plane] + (ptrdiff_t)(row + r) * COLUMNS + lane, x);
          }
      }
  }
}

inline void decode_matrix(int bits, const uint8_t* codes, int rows, int columns, int group, const float* scales,
                          float* out) {
  if (bits == 2) return decode_matrix<2>(codes, rows, columns, group, scales, out);
  if (bits == 4) return decode_matrix<4>(codes, rows, columns, group, scales, out);
  decode_matrix<8>(codes, rows, columns, group, scales, out);
}

// The same where scales belong to columns: `scales` is [rows / group][scale, low][columns].
template <int BITS>
inline void decode_columns(const uint8_t* codes, int rows, int columns, int group, const float* scales, float* out) {
  for_codes(PlanarCodes<BITS>{codes, rows, columns}, [&](int row, int column, VI code) {
    const float* at = scales + (ptrdiff_t)(row / group) * 2 * columns + column;
    storeu(out + ((ptrdiff_t)(column / COLUMNS) * rows + row) * COLUMNS + column % COLUMNS,
           to_float(code) * loadu(at) + loadu(at + columns));
  });
}

// Adds the two upper bits of the boosted channels of keys: 4 * code * scale.
inline void add_boost(const HalfTile& t, const KvsCodec& c, const uint8_t* page, const float* scales, float* out) {
  const int dim = t.head_dim, tokens = t.tokens, boosted = boosted_of(c), group = group_of(c, dim);
  const uint8_t* codes = page + boost_codes_at(c);
  const uint8_t* index = page + boost_index_at(c);
  for (int block = 0; block < tokens; block += 4 * LANES)
    for (int row = 0; row < boosted; row += 4)
      for (int lane = 0; lane < LANES; lane += VL, codes += 4 * VL) {
        const VI words = load_words(codes);
        for (int r = 0; r < 4; ++r) {
          const int channel = std::min<int>(index[row + r], dim - 1);  // whatever a damaged page has
          float* to = out + (ptrdiff_t)(block / COLUMNS * dim + channel) * COLUMNS + lane;
          for (int plane = 0; plane < 4; ++plane, to += LANES) {
            const float scale = 4 * scales[(block + plane * LANES) / group * 2 * dim + channel];
            storeu(to, loadu(to) + to_float(words >> (8 * r + 2 * plane) & 3) * scale);
          }
        }
      }
}

inline void decode_affine(const HalfTile& t, int stage, const uint8_t* page, float* panels) {
  const KvsCodec& c = t.chain.stage[stage];
  const int bits = bits_of(c), group = group_of(c, t.head_dim), rows = t.rows(), columns = t.columns();
  const uint8_t* codes = page + codes_at(c);
  const bool by_channel = axis_of(c) == BY_CHANNEL;
  float scales[MAX_SCALES];
  load_row(scales, page + scales_at(c), 2 * t.elements() / group, KVS_F16);
  if (by_channel != t.keys) {
    if (bits == 2) return decode_columns<2>(codes, rows, columns, group, scales, panels);
    if (bits == 4) return decode_columns<4>(codes, rows, columns, group, scales, panels);
    return decode_columns<8>(codes, rows, columns, group, scales, panels);
  }
  decode_matrix(bits, codes, rows, columns, group, scales, panels);
  if (boosted_of(c)) add_boost(t, c, page, scales, panels);
}

// Of values; what it decodes to is still rotated.
inline void decode_symmetric(const HalfTile& t, int stage, const uint8_t* page, float* panels) {
  const KvsCodec& c = t.chain.stage[stage];
  const float half_top = ((1 << bits_of(c)) - 1) * 0.5f;
  float scales[2 * MAX_TILE];
  load_row(scales, page + scales_at(c), t.tokens, KVS_F16);
  for (int i = 0; i < t.tokens; ++i) scales[t.tokens + i] = -half_top * scales[i];
  decode_matrix(bits_of(c), page + codes_at(c), t.tokens, t.head_dim, t.head_dim, scales, panels);
}

}  // namespace kvs
