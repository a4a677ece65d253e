// Weighted sum of the coded values of one page.
//
// value = code * scale + low, with a scale and a low for each token and group of channels (rotated values: one scale
// for each token, and lows that centre the codes). The scale goes into the weight, so that codes enter the product as
// they are; what the lows add is the same for all channels of a group.
#pragma once
#include "keys.h"

namespace kvs::gpu {

// Columns [first, end) of a page are visible: what it holds in the others never enters.
struct Columns {
  int first, end;
};

// The weights of 64 tokens times the scales of one group of channels.
struct ScaledWeights {
  uint32_t values[TILES][2];  // divided by peak
  float peak;
  float centre[2];  // what lows and the middle of the codes add, to be summed over g
  float sum[2];     // of the values: output = peak * (product with base + code - (base + middle) * sum) + centre
};

// Mask of the 16-bit numbers of tokens `token` and `token` + 1 that are visible.
KVS_LANE uint32_t visible_pair(Columns visible, int token) {
  const uint32_t first = token >= visible.first && token < visible.end ? 0xFFFFu : 0u;
  return first | (token + 1 >= visible.first && token + 1 < visible.end ? 0xFFFF0000u : 0u);
}

// Largest of the scales of the 64 tokens, which 16-bit floats have no room for.
template <class Number>
KVS_LANE float peak_of_scales(const uint32_t (&scales)[TILES]) {
  if (!Number::NARROW) return 1.0f;
  float peak = LEAST_PEAK;
  for (const uint32_t pair : scales) peak = max_of(peak, max_of(Half::low(pair), Half::high(pair)));
  return largest_over_g(peak);
}

// Folds the scales of the group of channels number `group` into the weights of tokens [column, column + 64).
template <class Number, int BITS>
KVS_LANE void scale_weights(ScaledWeights& scaled, const float (&weights)[TILES][4], const KvsLayout& layout,
                            const uint8_t* page, int column, Columns visible, int group, int g) {
  const int tokens = layout.tile_tokens;
  uint32_t scales[TILES], lows[TILES];  // of tokens 2g and 2g + 1
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const int token = column + TILE * n + 2 * g;
    const uint8_t* const at = page + scales_at(value_codec(layout)) + 2 * (group * 2 * tokens + token);
    const uint32_t used = visible_pair(visible, token);
    scales[n] = load_word(at) & used;
    lows[n] = layout.value_rotated ? 0u : load_word(at + 2 * tokens) & used;
  }
  scaled.peak = peak_of_scales<Number>(scales);
  const float inverse = 1.0f / scaled.peak, middle = layout.value_rotated ? 0.0f : Codes<Number, BITS>::MIDDLE;
  const Constant<Number> ones(1.0f);
  float sums[4] = {}, centre[2] = {};
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    float product[4];
    for (int i = 0; i < 4; ++i) {
      const float scale = i / 2 ? Half::high(scales[n]) : Half::low(scales[n]);
      const float low = i / 2 ? Half::high(lows[n]) : Half::low(lows[n]);
      product[i] = weights[n][i] * (scale * inverse);
      centre[i & 1] += weights[n][i] * (low + middle * scale);
    }
    pack_weights<Number>(scaled.values[n], product);
    Number::mma(sums, ones.a, scaled.values[n]);
  }
  for (int i = 0; i < 2; ++i) scaled.centre[i] = centre[i], scaled.sum[i] = sums[i];
}

// Adds the weighted values of 32 channels, number `unit`.
template <class Number, int DIM, int BITS>
KVS_LANE void add_unit(State<DIM>& state, const ScaledWeights& scaled, const KvsLayout& layout, const uint8_t* page,
                       int column, int unit, int lane) {
  using Coded = Codes<Number, BITS>;
  const int first_plane = 2 * unit % Coded::PLANES;
  const uint8_t* const codes =
      words_at<Number, BITS>(page, codes_at(value_codec(layout)), layout.tile_tokens, column, 32 * unit, lane);
  float products[2][4];
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i)
      products[n][i] = -(Coded::base(first_plane + n) + Coded::MIDDLE) * scaled.sum[i & 1];
#pragma unroll
  for (int s = 0; s < TILES; ++s) {
    const Words words = load_words(codes + 4 * s * QUAD_BYTES);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t a[4];
      Coded::fragment(a, words, first_plane + n);
      Number::mma(products[n], a, scaled.values[s]);
    }
  }
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) state.output[2 * unit + n][i] += scaled.peak * products[n][i];
  for (int i = 0; i < 2; ++i) state.offset[unit][i] += scaled.centre[i];
}

// Adds the values of the tokens [column, column + 64) of a page, by their weights.
template <class Number, int DIM, int BITS>
KVS_LANE void add_values(State<DIM>& state, const float (&weights)[TILES][4], const KvsLayout& layout,
                         const uint8_t* page, int column, Columns visible, int lane) {
  ScaledWeights scaled;
#pragma unroll
  for (int unit = 0; unit < DIM / 32; ++unit) {
    const int group_channels = group_of(value_codec(layout), DIM), group = 32 * unit / group_channels;
    if (32 * unit % group_channels == 0)
      scale_weights<Number, BITS>(scaled, weights, layout, page, column, visible, group, lane / 4);
    add_unit<Number, DIM, BITS>(state, scaled, layout, page, column, unit, lane);
  }
}

}  // namespace kvs::gpu
