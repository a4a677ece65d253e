// Attention of H heads over one sealed page.
#pragma once
#include "codes.h"
#include "softmax.h"

namespace kvs {

// Per-thread buffers for one page and H <= MAX_HEADS heads.
struct PageScratch {
  alignas(64) float scores[MAX_HEADS * MAX_TOKENS];
  alignas(64) float x[MAX_HEADS * MAX_SEALED_DIM];
  alignas(64) float boost_x[MAX_HEADS * MAX_SEALED_DIM];
  alignas(64) int16_t factors[MAX_HEADS * MAX_SEALED_DIM];
  alignas(64) int16_t boost_factors[MAX_HEADS * MAX_SEALED_DIM];
};

// Rounds x * scale to integers; returns the sum of what rounding took away.
KVS_INLINE float round_factors(const float* x, int n, float scale, int16_t* to) {
  VF lost = {};
  for (int i = 0; i < n; i += VL) {
    const VF exact = loadu(x + i) * scale, rounded = vround(exact);
    store_int16(to + i, rounded);
    lost += exact - rounded;
  }
  return hsum(lost);
}

// Sum of code * lost is about (middle code) * (sum of lost): adding that halves the rounding error and frees it of the
// part all columns share, which un-rotating would concentrate in one channel.
template <int BITS>
constexpr float MIDDLE_CODE = 0.5f * ((1 << BITS) - 1);

// x[h][d] = q[h][d] * scale[d]; low_dot[h] = q[h] . low; top[h] = max |x[h]|.
template <int H>
KVS_INLINE void scale_queries(const Heads& heads, const uint16_t* scale, float* x, float (&low_dot)[H],
                              float (&top)[H]) {
  const uint16_t* low = scale + heads.head_dim;
  VF dots[H] = {}, tops[H] = {};
  for (int d = 0; d < heads.head_dim; d += VL) {
    const VF s = load_half(scale + d), l = load_half(low + d);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const VF q = loadu(heads.q + h * heads.head_dim + d), scaled = q * s;
      storeu(x + h * MAX_SEALED_DIM + d, scaled);
      dots[h] += q * l;
      tops[h] = vmax(tops[h], vabs(scaled));
    }
  }
  for (int h = 0; h < H; ++h) {
    low_dot[h] = hsum(dots[h]);
    top[h] = hmax(tops[h]);
  }
}

// boost_x[h][r] = 4 * x[h][index[r]]; raises top[h] to max |boost_x[h]|.
template <int H>
KVS_INLINE void gather_boosted(const uint8_t* index, int rows, PageScratch& s, float (&top)[H]) {
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) s.boost_x[h * MAX_SEALED_DIM + r] = s.x[h * MAX_SEALED_DIM + index[r]];
  for (int h = 0; h < H; ++h) {
    float* x = s.boost_x + h * MAX_SEALED_DIM;
    VF tops = splat(top[h]);
    for (int r = 0; r < rows; r += VL) {
      const VF v = loadu(x + r) * 4.0f;
      storeu(x + r, v);
      tops = vmax(tops, vabs(v));
    }
    top[h] = hmax(tops);
  }
}

// scores[h][t] = q[h] . K[t], over all tokens of the page.
template <int BITS, int H>
void score_page(const KvsLayout& l, const uint8_t* page, const Heads& heads, PageScratch& s) {
  const Codes codes{page + l.key_codes, page + l.key_boost_codes, l.head_dim, l.boost_channels};
  const Factors factors{s.factors, s.boost_factors, MAX_SEALED_DIM, MAX_SEALED_DIM};
  const float limit = factor_limit<BITS>(l.head_dim + l.boost_channels);
  for (int first = 0; first < l.tile_tokens; first += l.key_group) {
    const uint16_t* scale = (const uint16_t*)(page + l.key_scales) + first / l.key_group * 2 * l.head_dim;
    float low_dot[H], top[H], unit[H];
    scale_queries<H>(heads, scale, s.x, low_dot, top);
    if (l.boost_channels) gather_boosted<H>(page + l.key_boost_index, l.boost_channels, s, top);
    for (int h = 0; h < H; ++h) {
      const int row = h * MAX_SEALED_DIM;
      const float inverse = top[h] > 0 ? limit / top[h] : 0.0f;
      unit[h] = top[h] / limit;
      float lost = round_factors(s.x + row, l.head_dim, inverse, s.factors + row);
      if (l.boost_channels) lost += round_factors(s.boost_x + row, l.boost_channels, inverse, s.boost_factors + row);
      low_dot[h] += MIDDLE_CODE<BITS> * unit[h] * lost;
    }
    for (int t = first; t < first + l.key_group; t += COLUMNS) {
      V8 sums[H][4];
      dot_columns<BITS, H>(codes, factors, t / COLUMNS, sums);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int plane = 0; plane < 4; ++plane) {
          const V8 score = sums[h][plane] * unit[h] + low_dot[h];
          memcpy(s.scores + h * MAX_TOKENS + t + 8 * plane, &score, sizeof score);
        }
    }
  }
}

// x[h][t] = p[h][t] * scale[t]; low_dot[h] = p[h] . low, where low is null: x[h] . 1 * rotated_low.
template <int H>
KVS_INLINE void scale_weights(const float* weights, int tokens, const uint16_t* scale, const uint16_t* low,
                              float rotated_low, float* x, float (&low_dot)[H], float (&top)[H]) {
  for (int h = 0; h < H; ++h) {
    VF dots = {}, tops = {};
    for (int t = 0; t < tokens; t += VL) {
      const VF p = loadu(weights + h * MAX_TOKENS + t), scaled = p * load_half(scale + t);
      storeu(x + h * MAX_SEALED_DIM + t, scaled);
      dots += low ? p * load_half(low + t) : scaled;
      tops = vmax(tops, scaled);
    }
    low_dot[h] = low ? hsum(dots) : hsum(dots) * rotated_low;
    top[h] = hmax(tops);
  }
}

// out[h] = out[h] * rescale[h] + sum over t of weights[h][t] * V[t]; the weights lie in scores.
template <int BITS, int H>
void weigh_page(const KvsLayout& l, const uint8_t* page, const Heads& heads, const float* rescale, PageScratch& s) {
  const Codes codes{page + l.value_codes, nullptr, l.tile_tokens, 0};
  const Factors factors{s.factors, nullptr, MAX_SEALED_DIM, 0};
  const uint16_t* scales = (const uint16_t*)(page + l.value_scales);
  const float limit = factor_limit<BITS>(l.tile_tokens);
  for (int first = 0; first < l.head_dim; first += l.value_group) {
    const uint16_t* scale = scales + first / l.value_group * 2 * l.tile_tokens;
    const uint16_t* low = l.value_rotated ? nullptr : scale + l.tile_tokens;
    float low_dot[H], top[H], unit[H];
    scale_weights<H>(s.scores, l.tile_tokens, scale, low, -MIDDLE_CODE<BITS>, s.x, low_dot, top);
    for (int h = 0; h < H; ++h) {
      unit[h] = top[h] / limit;
      const float inverse = top[h] > 0 ? limit / top[h] : 0.0f;
      const int row = h * MAX_SEALED_DIM;
      low_dot[h] += MIDDLE_CODE<BITS> * unit[h] * round_factors(s.x + row, l.tile_tokens, inverse, s.factors + row);
    }
    for (int d = first; d < first + l.value_group; d += COLUMNS) {
      V8 sums[H][4];
      dot_columns<BITS, H>(codes, factors, d / COLUMNS, sums);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int plane = 0; plane < 4; ++plane) {
          float* to = heads.out + h * heads.head_dim + d + 8 * plane;
          V8 out;
          memcpy(&out, to, sizeof out);
          out = out * rescale[h] + (sums[h][plane] * unit[h] + low_dot[h]);
          memcpy(to, &out, sizeof out);
        }
    }
  }
}

using ScorePage = void (*)(const KvsLayout&, const uint8_t*, const Heads&, PageScratch&);
using WeighPage = void (*)(const KvsLayout&, const uint8_t*, const Heads&, const float*, PageScratch&);

template <int BITS>
ScorePage score_page_for(int heads) {
  const ScorePage table[] = {score_page<BITS, 1>, score_page<BITS, 2>, score_page<BITS, 3>, score_page<BITS, 4>};
  return table[heads - 1];
}
template <int BITS>
WeighPage weigh_page_for(int heads) {
  const WeighPage table[] = {weigh_page<BITS, 1>, weigh_page<BITS, 2>, weigh_page<BITS, 3>, weigh_page<BITS, 4>};
  return table[heads - 1];
}

inline void mask_tokens(float* scores, int heads, int first, int last) {
  for (int h = 0; h < heads; ++h)
    for (int t = first; t < last; ++t) scores[h * MAX_TOKENS + t] = NEG_INF;
}

// Tokens [first, tile_tokens) of a page, for `count` <= MAX_HEADS heads; first < tile_tokens.
inline void attend_page(const KvsLayout& l, const uint8_t* page, const Heads& heads, int count, int first,
                        PageScratch& s) {
  const ScorePage score = l.key_bits == 2   ? score_page_for<2>(count)
                          : l.key_bits == 4 ? score_page_for<4>(count)
                                            : score_page_for<8>(count);
  const WeighPage weigh = l.value_bits == 2   ? weigh_page_for<2>(count)
                          : l.value_bits == 4 ? weigh_page_for<4>(count)
                                              : weigh_page_for<8>(count);
  score(l, page, heads, s);
  if (first > 0) mask_tokens(s.scores, count, 0, first);
  float rescale[MAX_HEADS];
  for (int h = 0; h < count; ++h) {
    float one[1];
    softmax_step<1>(heads_from(heads, h), s.scores + h * MAX_TOKENS, l.tile_tokens, one);
    rescale[h] = one[0];
  }
  weigh(l, page, heads, rescale, s);
}

}  // namespace kvs
