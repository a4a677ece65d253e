// Sealing one tile of one KV head: kvserve/pages/reference.py `encode_page`, operation for operation.
#pragma once
#include <algorithm>
#include <cmath>

#include "geometry.h"
#include "simd.h"

namespace kvs {

constexpr int MAX_TILE = 128, MAX_DIM = 256;
constexpr float MIN_SCALE = 0x1p-20f;

// Buffers for one tile. Codes are [row][column]: K [channel][token], V [token][channel].
struct TileScratch {
  float key[MAX_TILE * MAX_DIM], value[MAX_TILE * MAX_DIM];  // [token][head_dim]
  uint8_t codes[MAX_TILE * MAX_DIM], boost_codes[MAX_TILE * MAX_DIM];
};

// Bytes of codes [rows][columns] (rows a multiple of 8, columns of 64 / bits), as `pack_codes` in reference.py.
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

// A stored affine code: value = code * scale + low, both as their float16 bits say.
struct Range {
  uint16_t scale, low;
};

inline Range range_of(float low, float high, int bits) {
  const float scale = (high - low) / float((1 << bits) - 1);
  return {float_to_half_saturated(std::max(scale, MIN_SCALE)), float_to_half_saturated(low)};
}

// Codes of n values that lie `stride` apart, to `to`.
inline void affine_codes(const float* x, int stride, int n, Range range, int bits, uint8_t* to) {
  const float low = half_to_float(range.low), inverse = 1.0f / half_to_float(range.scale), top = (1 << bits) - 1;
  for (int i = 0; i < n; ++i) {
    const float scaled = (x[i * stride] - low) * inverse;
    to[i] = uint8_t(std::nearbyint(std::min(std::max(scaled, 0.0f), top)));
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

// The channels with the widest range over tokens [first, tile_tokens); ties: the lower one. index: ascending.
inline void pick_boosted(const KvsLayout& l, const float* key, int first, uint8_t* index) {
  float low[MAX_DIM], spread[MAX_DIM];
  uint8_t order[MAX_DIM];
  channel_ranges(key, l.head_dim, first, l.tile_tokens, low, spread);
  for (int d = 0; d < l.head_dim; ++d) {
    spread[d] -= low[d];
    order[d] = uint8_t(d);
  }
  std::stable_sort(order, order + l.head_dim, [&](uint8_t x, uint8_t y) { return spread[x] > spread[y]; });
  std::sort(order, order + l.boost_channels);
  std::copy(order, order + l.boost_channels, index);
}

inline void encode_keys(const KvsLayout& l, TileScratch& s, int first_counted, uint8_t* page) {
  const int tokens = l.tile_tokens, dim = l.head_dim;
  uint8_t* index = page + l.key_boost_index;
  int8_t boost_row[MAX_DIM + 1];
  std::fill(boost_row, boost_row + dim, int8_t(-1));
  if (l.boost_channels) pick_boosted(l, s.key, first_counted, index);
  for (int r = 0; r < l.boost_channels; ++r) boost_row[index[r]] = int8_t(r);
  for (int first = 0; first < tokens; first += l.key_group) {
    float low[MAX_DIM], high[MAX_DIM];
    channel_ranges(s.key, dim, std::max(first, std::min(first_counted, first + l.key_group)), first + l.key_group, low,
                   high);
    uint16_t* scales = (uint16_t*)(page + l.key_scales) + first / l.key_group * 2 * dim;
    for (int d = 0; d < dim; ++d) {
      const int bits = boost_row[d] < 0 ? l.key_bits : 4;
      const Range range = range_of(low[d], high[d], bits);
      uint8_t* codes = s.codes + d * tokens + first;
      affine_codes(s.key + first * dim + d, dim, l.key_group, range, bits, codes);
      scales[d] = range.scale;
      scales[dim + d] = range.low;
      if (boost_row[d] < 0) continue;
      uint8_t* boost = s.boost_codes + boost_row[d] * tokens + first;
      for (int t = 0; t < l.key_group; ++t) {
        boost[t] = codes[t] >> 2;
        codes[t] &= 3;
      }
    }
  }
  pack_codes(s.codes, dim, tokens, l.key_bits, page + l.key_codes);
  if (l.boost_channels) pack_codes(s.boost_codes, l.boost_channels, tokens, 2, page + l.key_boost_codes);
}

// Symmetric mid-rise codes of one rotated row; returns the scale (see `quantise_symmetric`).
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

inline void encode_values(const KvsLayout& l, TileScratch& s, uint8_t* page) {
  const int tokens = l.tile_tokens, dim = l.head_dim;
  uint16_t* scales = (uint16_t*)(page + l.value_scales);
  for (int t = 0; t < tokens; ++t) {
    const float* x = s.value + t * dim;
    uint8_t* codes = s.codes + t * dim;
    if (l.value_rotated) {
      scales[t] = float_to_half_saturated(symmetric_codes(x, dim, l.value_bits, codes));
      continue;
    }
    for (int first = 0; first < dim; first += l.value_group) {
      const auto [low, high] = std::minmax_element(x + first, x + first + l.value_group);
      const Range range = range_of(*low, *high, l.value_bits);
      affine_codes(x + first, 1, l.value_group, range, l.value_bits, codes + first);
      scales[first / l.value_group * 2 * tokens + t] = range.scale;
      scales[(first / l.value_group * 2 + 1) * tokens + t] = range.low;
    }
  }
  pack_codes(s.codes, tokens, dim, l.value_bits, page + l.value_codes);
}

inline void write_slot(const KvsLayout& l, const float* key, const float* value, uint8_t* slot) {
  store_row(slot, key, l.head_dim, l.dense_dtype);
  store_row(slot + slot_bytes(l) / 2, value, l.head_dim, l.dense_dtype);
}

// Writes every section of `page`, and zeroes its padding, from s.key and s.value.
inline void encode_page(const KvsLayout& l, TileScratch& s, int first_counted, uint8_t* page) {
  if (all_dense(l)) {
    for (int t = 0; t < l.tile_tokens; ++t, page += slot_bytes(l))
      write_slot(l, s.key + t * l.head_dim, s.value + t * l.head_dim, page);
    return;
  }
  std::fill(page, page + l.page_bytes, uint8_t(0));
  encode_keys(l, s, first_counted, page);
  encode_values(l, s, page);
}

}  // namespace kvs
