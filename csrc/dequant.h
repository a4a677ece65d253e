// Decode of one sealed page to float32, in the panels that gemm.h multiplies: [column panel of 64][row][64].
// Keys: rows are channels, columns tokens; values: rows are tokens, columns channels (kvserve/pages/reference.py).
#pragma once
#include <cstddef>

#include "simd.h"

namespace kvs {

constexpr int COLUMNS = 64;  // of one panel
constexpr int MAX_SCALES = 2 * 1024;  // keys: 128 tokens / 32 * 256 channels pairs; values: 256 / 32 * 128


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

// Adds the two upper bits of the boosted channels: 4 * code * scale.
inline void add_boost(const KvsLayout& layout, const uint8_t* page, const float* scales, float* out) {
  const int dim = layout.head_dim, tokens = layout.tile_tokens, boosted = layout.boost_channels;
  const uint8_t* codes = page + layout.key_boost_codes;
  const uint8_t* index = page + layout.key_boost_index;
  for (int block = 0; block < tokens; block += 4 * LANES)
    for (int row = 0; row < boosted; row += 4)
      for (int lane = 0; lane < LANES; lane += VL, codes += 4 * VL) {
        const VI words = load_words(codes);
        for (int r = 0; r < 4; ++r) {
          const int channel = index[row + r];
          float* to = out + (ptrdiff_t)(block / COLUMNS * dim + channel) * COLUMNS + lane;
          for (int plane = 0; plane < 4; ++plane, to += LANES) {
            const float scale = 4 * scales[(block + plane * LANES) / layout.key_group * 2 * dim + channel];
            storeu(to, loadu(to) + to_float(words >> (8 * r + 2 * plane) & 3) * scale);
          }
        }
      }
}

// Keys of a page, transposed: [tile_tokens / 64][head_dim][64 tokens].
inline void decode_keys(const KvsLayout& layout, const uint8_t* page, float* out) {
  float scales[MAX_SCALES];
  const int dim = layout.head_dim, tokens = layout.tile_tokens;
  load_row(scales, page + layout.key_scales, 2 * dim * tokens / layout.key_group, KVS_F16);
  decode_matrix(layout.key_bits, page + layout.key_codes, dim, tokens, layout.key_group, scales, out);
  if (layout.boost_channels) add_boost(layout, page, scales, out);
}

// Values of a page (still rotated where the policy rotates): [head_dim / 64, rounded up][tile_tokens][64 channels].
inline void decode_values(const KvsLayout& layout, const uint8_t* page, float* out) {
  float scales[MAX_SCALES];
  const int dim = layout.head_dim, tokens = layout.tile_tokens;
  int group = layout.value_group;
  if (layout.value_rotated) {
    const float half_top = ((1 << layout.value_bits) - 1) * 0.5f;
    load_row(scales, page + layout.value_scales, tokens, KVS_F16);
    for (int t = 0; t < tokens; ++t) scales[tokens + t] = -half_top * scales[t];
    group = dim;
  } else {
    load_row(scales, page + layout.value_scales, 2 * tokens * dim / group, KVS_F16);
  }
  decode_matrix(layout.value_bits, page + layout.value_codes, tokens, dim, group, scales, out);
}

}  // namespace kvs
