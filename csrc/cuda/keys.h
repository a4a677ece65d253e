// Scores of the coded keys of one page.
//
// key = code * scale + low, with a scale and a low for each channel and group of tokens. The scale goes into the query,
// so that codes enter the product as they are; the lows are one number for each query head and group of tokens.
#pragma once
#include "../codecs/fields.h"
#include "softmax.h"

namespace kvs::gpu {

constexpr int BOOST_BITS = 2;
constexpr float LEAST_PEAK = 1e-30f;  // its inverse is finite

// Eight query rows in shared memory. Every four channels lie in the order of a B fragment: 0, 2, 1, 3.
constexpr KVS_LANE int query_place(int channel) { return (channel & ~3) | (channel & 1) << 1 | (channel >> 1 & 1); }

struct Query {
  const uint16_t* row;  // head g
};

// The B fragment of channels 16 * step + 4t..4t + 3 of head g.
KVS_LANE Words query_fragment(const Query& query, int step, int t) {
  return *reinterpret_cast<const Words*>(query.row + TILE * step + 4 * t);
}

// A query times the scales of one group of tokens.
template <int DIM>
struct ScaledQuery {
  uint32_t values[DIM / TILE][2];        // divided by peak
  uint32_t boost_values[DIM / 32][2];    // of the boosted channels, in their order
  float peak;
  float centre[2], sum[2];  // of heads 2t and 2t + 1: score = peak * (product with base + code) + centre - base * sum
};

// The largest scale of a group of tokens: 16-bit floats have no room for a query times a scale.
template <class Number, int DIM>
KVS_LANE float peak_of_scales(const uint8_t* scales, int lane) {
  if (!Number::NARROW) return 1.0f;
  const Words scale = load_words(scales + 8 * lane % (2 * DIM));
  float peak = max_of(LEAST_PEAK, max_of(Half::low(scale.first), Half::high(scale.first)));
  peak = max_of(peak, max_of(Half::low(scale.second), Half::high(scale.second)));
  for (int mask = 1; mask < 32; mask *= 2) peak = max_of(peak, shuffle_xor(peak, mask));
  return peak;
}

// A query's channels 4t..4t + 3 times their scales, as a B fragment; `centre` gains what the middle of the codes adds.
template <class Number>
KVS_LANE void scale_channels(uint32_t (&scaled)[2], Words query, Words scale, Words low, float middle, float inverse,
                             float& centre) {
  const float x[4] = {Number::low(query.first), Number::low(query.second), Number::high(query.first),
                      Number::high(query.second)};
  const float scales[4] = {Half::low(scale.first), Half::high(scale.first), Half::low(scale.second),
                           Half::high(scale.second)};
  const float lows[4] = {Half::low(low.first), Half::high(low.first), Half::low(low.second), Half::high(low.second)};
  float y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    centre += x[i] * (lows[i] + middle * scales[i]);
    y[i] = x[i] * (scales[i] * inverse);
  }
  scaled[0] = Number::pack(y[0], y[2]);
  scaled[1] = Number::pack(y[1], y[3]);
}

// The boosted channels' B fragments; `sums` gains four times their sum.
template <class Number, int DIM>
KVS_LANE void scale_boosted(ScaledQuery<DIM>& scaled, float (&sums)[4], const Query& query, const KvsLayout& layout,
                            const uint8_t* page, const uint8_t* scales, float inverse, int t) {
  const Constant<Number> fours(4.0f);
#pragma unroll
  for (int s = 0; s < DIM / 32; ++s) {
    if (s * TILE >= boosted_of(key_codec(layout))) break;
    const uint32_t channels = load_word(page + boost_index_at(key_codec(layout)) + TILE * s + 4 * t);
    float x[4];
    for (int i = 0; i < 4; ++i) {
      const int channel = channels >> 8 * i & 0xFF;
      const float scale = Half::low(reinterpret_cast<const uint16_t*>(scales)[channel]);
      x[i] = Number::low(query.row[query_place(channel)]) * (scale * inverse);
    }
    scaled.boost_values[s][0] = Number::pack(x[0], x[2]);
    scaled.boost_values[s][1] = Number::pack(x[1], x[3]);
    Number::mma(sums, fours.a, scaled.boost_values[s]);
  }
}

// From this lane's share for head g to the sums of heads 2t and 2t + 1.
KVS_LANE void sum_for_heads(float (&sums)[2], float share, int t) {
  share += shuffle_xor(share, 1);
  share += shuffle_xor(share, 2);
  sums[0] = shuffle(share, 8 * t);
  sums[1] = shuffle(share, 8 * t + 4);
}

// Folds the scales of one group of tokens into the query.
template <class Number, int DIM, int BITS>
KVS_LANE void scale_query(ScaledQuery<DIM>& scaled, const Query& query, const KvsLayout& layout, const uint8_t* page,
                          const uint8_t* scales, int lane) {
  constexpr float MIDDLE = Codes<Number, BITS>::MIDDLE;
  const int t = lane % 4;
  scaled.peak = peak_of_scales<Number, DIM>(scales, lane);
  const float inverse = 1.0f / scaled.peak;
  const Constant<Number> ones(1.0f);
  float centre = 0.0f, sums[4] = {};
#pragma unroll
  for (int s = 0; s < DIM / TILE; ++s) {
    const uint8_t* const at = scales + 2 * TILE * s + 8 * t;
    const Words scale = load_words(at), low = load_words(at + 2 * DIM);
    scale_channels<Number>(scaled.values[s], query_fragment(query, s, t), scale, low, MIDDLE, inverse, centre);
    Number::mma(sums, ones.a, scaled.values[s]);
  }
  sum_for_heads(scaled.centre, centre, t);
  for (int i = 0; i < 2; ++i) scaled.centre[i] -= scaled.peak * MIDDLE * sums[i];
  if (BITS == BOOST_BITS && boosted_of(key_codec(layout)))
    scale_boosted<Number>(scaled, sums, query, layout, page, scales, inverse, t);
  for (int i = 0; i < 2; ++i) scaled.sum[i] = scaled.peak * sums[i];
}

// This lane's words in shared memory of the 32 columns from `column` on: row quad t from `first_row` on, of all `rows`.
template <class Number, int BITS>
KVS_LANE const uint8_t* words_at(const uint8_t* page, int64_t section, int rows, int first_row, int column, int lane) {
  const int block = column / Codes<Number, BITS>::BLOCK_COLUMNS;
  return page + placed(int(section) + (block * rows / 4 + first_row / 4 + lane % 4) * QUAD_BYTES + lane / 4 * 8);
}

// Products of a query with two tiles of keys, from token `column` of the page on.
template <class Number, int DIM, int BITS>
KVS_LANE void key_products(float (&products)[2][4], const ScaledQuery<DIM>& scaled, const KvsLayout& layout,
                           const uint8_t* page, int column, int first_plane, int lane) {
  const uint8_t* const codes = words_at<Number, BITS>(page, codes_at(key_codec(layout)), DIM, 0, column, lane);
#pragma unroll
  for (int s = 0; s < DIM / TILE; ++s) {
    const Words words = load_words(codes + 4 * s * QUAD_BYTES);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t a[4];
      Codes<Number, BITS>::fragment(a, words, first_plane + n);
      Number::mma(products[n], a, scaled.values[s]);
    }
  }
  if (BITS != BOOST_BITS || !boosted_of(key_codec(layout))) return;
  const KvsCodec& codec = key_codec(layout);
  const uint8_t* const boost =
      words_at<Number, BOOST_BITS>(page, boost_codes_at(codec), boosted_of(codec), 0, column, lane);
#pragma unroll
  for (int s = 0; s < DIM / 32; ++s) {
    if (s * TILE >= boosted_of(codec)) break;
    const Words words = load_words(boost + 4 * s * QUAD_BYTES);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t a[4];
      Codes<Number, BOOST_BITS>::fragment(a, words, first_plane + n, BOOST_BITS);
      Number::mma(products[n], a, scaled.boost_values[s]);
    }
  }
}

// Scores of the tokens [column, column + 64) of a page, times `scale`.
template <class Number, int DIM, int BITS>
KVS_LANE void key_scores(float (&scores)[TILES][4], const Query& query, const KvsLayout& layout,
                         const uint8_t* page, int column, float scale, int lane) {
  using Coded = Codes<Number, BITS>;
  const uint8_t* const scales = page + scales_at(key_codec(layout));
  const int group_tokens = group_of(key_codec(layout), DIM);
  ScaledQuery<DIM> scaled;
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    if (unit == 0 || group_tokens == 32) {
      const int group = (column + 32 * unit) / group_tokens;
      scale_query<Number, DIM, BITS>(scaled, query, layout, page, scales + group * 4 * DIM, lane);
    }
    const int first_plane = 2 * unit % Coded::PLANES;
    float products[2][4] = {};
    key_products<Number, DIM, BITS>(products, scaled, layout, page, column + 32 * unit, first_plane, lane);
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i) {
        const float rest = scaled.centre[i & 1] - Coded::base(first_plane + n) * scaled.sum[i & 1];
        scores[2 * unit + n][i] = (scaled.peak * products[n][i] + rest) * scale;
      }
  }
}

}  // namespace kvs::gpu
