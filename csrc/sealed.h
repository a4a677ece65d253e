// Scores and weighted sums of a few sealed pages in integers: affine keys with scales per channel, affine or symmetric
// values with scales per token, without wrappers.
//
// Every phase (factors of q, dots, softmax, factors of p, dots) runs over all pages of the batch before the next one
// starts: a phase is a chain of reductions, and the chains of different pages overlap.
#pragma once
#include <algorithm>

#include "codecs/fields.h"
#include "codes.h"
#include "pages.h"

namespace kvs {

// What turns numbers of which the largest is `top` into factors up to `limit`. 0 where they are next to nothing beside the
// weight 1 of the largest score: its inverse could be infinite, and a weight may be as small as exp(-87).
KVS_INLINE float factors_of(float top, float limit) { return top > 1e-30f ? limit / top : 0.0f; }

// Rounds x * scale to integers; returns what rounding took away, summed per lane.
KVS_INLINE VF round_factors(const float* x, int n, float scale, int16_t* to) {
  VF exact = {};
  VI rounded = {};
  for (int i = 0; i < n; i += VL) {
    const VF v = loadu(x + i) * scale;
    rounded += store_factors(to + i, v);
    exact += v;
  }
  return exact - to_float(rounded);
}

// Sum of code * lost is about (middle code) * (sum of lost): adding that halves the rounding error and frees it of the
// part all columns share, which un-rotating would concentrate in one channel.
template <int BITS>
constexpr float MIDDLE_CODE = 0.5f * ((1 << BITS) - 1);

// x[h][d] = q[h][d] * scale[d]; low_dot[h]: q[h] . low, per lane. Returns max |x|, per lane.
template <int H>
KVS_INLINE VF scale_queries(const Heads& heads, const uint16_t* scale, float* x, VF (&low_dot)[H]) {
  const uint16_t* low = scale + heads.head_dim;
  VF top = {};
  for (int h = 0; h < H; ++h) low_dot[h] = VF{};
  for (int d = 0; d < heads.head_dim; d += VL) {
    const VF s = load_half(scale + d), l = load_half(low + d);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const VF q = loadu(heads.q + h * heads.head_dim + d), scaled = q * s;
      storeu(x + h * MAX_SEALED_DIM + d, scaled);
      low_dot[h] += q * l;
      top = vmax(top, vabs(scaled));
    }
  }
  return top;
}

// Factors of the boosted channels fill whole vectors; those behind them are 0.
KVS_INLINE int boost_factors(const KvsCodec& c) { return (boosted_of(c) + LANES - 1) / LANES * LANES; }

// boost_x[h][r] = 4 * x[h][index[r]]. Returns max |boost_x|, per lane.
template <int H>
KVS_INLINE VF gather_boosted(int boosted, const uint8_t* index, int factors, PageScratch& s) {
  for (int r = 0; r < boosted; ++r)
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) s.boost_x[h * MAX_SEALED_DIM + r] = s.x[h * MAX_SEALED_DIM + index[r]];
  VF top = {};
  for (int h = 0; h < H; ++h) {
    float* x = s.boost_x + h * MAX_SEALED_DIM;
    std::fill(x + boosted, x + factors, 0.0f);
    for (int r = 0; r < factors; r += VL) {
      const VF v = loadu(x + r) * 4.0f;
      storeu(x + r, v);
      top = vmax(top, vabs(v));
    }
  }
  return top;
}

// Integer factors of one group of tokens, the `index`-th of the batch: score = dot * unit + low_dot.
template <int BITS, int H>
KVS_INLINE void query_factors(const KvsLayout& l, const uint8_t* page, int group, int index, const Heads& heads,
                              PageScratch& s) {
  const KvsCodec& codec = key_codec(l);
  const int boosted = boosted_of(codec), boost_rows = boost_factors(codec), rows = l.head_dim + boost_rows;
  const uint16_t* scale = (const uint16_t*)(page + scales_at(codec)) + group * 2 * l.head_dim;
  const float limit = factor_limit<BITS>(rows);
  VF lows[H];
  VF tops = scale_queries<H>(heads, scale, s.x, lows);
  if (boosted) tops = vmax(tops, gather_boosted<H>(boosted, page + boost_index_at(codec), boost_rows, s));
  const float top = hmax(tops), inverse = factors_of(top, limit), unit = top / limit;
  s.unit[index] = unit;
  for (int h = 0; h < H; ++h) {
    int16_t* to = s.factors + (index * H + h) * rows;
    VF lost = round_factors(s.x + h * MAX_SEALED_DIM, l.head_dim, inverse, to);
    if (boosted) lost += round_factors(s.boost_x + h * MAX_SEALED_DIM, boost_rows, inverse, to + l.head_dim);
    s.low_dot[index][h] = hsum(lows[h] + lost * (MIDDLE_CODE<BITS> * unit));
  }
}

// scores[h][t] = q[h] . K[t] for 16 * SUBS tokens of one group, from token `first` of the page on; `rows` factors a head.
template <int BITS, int H, int SUBS>
KVS_INLINE void score_columns(const Codes& codes, int rows, int first, int index, float* scores,
                              const PageScratch& s) {
  const int16_t* x = s.factors + index * H * rows;
  for (int lane = 0; lane < LANES; lane += VL) {
    VF sums[H][SUBS];
    dot_columns<BITS, H, SUBS>(codes, {x, x + codes.rows, rows}, first, lane, s.unit[index], sums);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
      for (int i = 0; i < SUBS; ++i)
        storeu(scores + h * MAX_TOKENS + first + i * LANES + lane, sums[h][i] + s.low_dot[index][h]);
  }
}

// scores[h][i * tile_tokens + t] = q[h] . K[t] of page i
template <int BITS, int H>
void score_pages(const KvsLayout& l, const Pages& pages, const Heads& heads, PageScratch& s) {
  const KvsCodec& codec = key_codec(l);
  const int group = group_of(codec, l.head_dim), groups = l.tile_tokens / group;
  const int rows = l.head_dim + boost_factors(codec);
  for (int i = 0; i < pages.count; ++i) {
    pages.prefetch_quarter(i, 0);
    for (int g = 0; g < groups; ++g) query_factors<BITS, H>(l, pages.pages[i], g, i * groups + g, heads, s);
  }
  for (int i = 0; i < pages.count; ++i) {
    pages.prefetch_quarter(i, 1);
    const uint8_t* page = pages.pages[i];
    const Codes codes{page + codes_at(codec), page + boost_codes_at(codec), l.head_dim, boosted_of(codec)};
    float* scores = s.scores + i * l.tile_tokens;
    for (int g = 0; g < groups; ++g) {
      const int first = g * group, index = i * groups + g;
      if (group % 64)
        score_columns<BITS, H, 2>(codes, rows, first, index, scores, s);
      else
        for (int t = 0; t < group; t += 64) score_columns<BITS, H, 4>(codes, rows, first + t, index, scores, s);
    }
  }
}

// x[h][t] = p[h][t] * scale[t]; low_dot[h]: p[h] . low per lane, where low is null: x[h] . 1 * rotated_low.
// Returns max |x|, per lane.
template <int H>
KVS_INLINE VF scale_weights(const float* weights, int tokens, const uint16_t* scale, const uint16_t* low,
                            float rotated_low, float* x, VF (&low_dot)[H]) {
  VF top = {};
  for (int h = 0; h < H; ++h) low_dot[h] = VF{};
  for (int t = 0; t < tokens; t += VL) {
    const VF s = load_half(scale + t), l = low ? load_half(low + t) : s * rotated_low;
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const VF p = loadu(weights + h * MAX_TOKENS + t), scaled = p * s;
      storeu(x + h * MAX_SEALED_DIM + t, scaled);
      low_dot[h] += p * l;
      top = vmax(top, scaled);
    }
  }
  return top;
}

// Integer factors of p for one group of channels, the `index`-th of the batch: out += dot * unit + low_dot.
template <int BITS, int H>
KVS_INLINE void weight_factors(const KvsLayout& l, const uint8_t* page, int group, int index, const float* weights,
                               PageScratch& s) {
  const int tokens = l.tile_tokens;
  const uint16_t* scale = (const uint16_t*)(page + scales_at(value_codec(l))) + group * 2 * tokens;
  const uint16_t* low = l.value_rotated ? nullptr : scale + tokens;
  const float limit = factor_limit<BITS>(tokens);
  VF lows[H];
  const float top = hmax(scale_weights<H>(weights, tokens, scale, low, -MIDDLE_CODE<BITS>, s.x, lows));
  const float inverse = factors_of(top, limit), unit = top / limit;
  s.unit[index] = unit;
  for (int h = 0; h < H; ++h) {
    int16_t* to = s.factors + (index * H + h) * tokens;
    const VF lost = round_factors(s.x + h * MAX_SEALED_DIM, tokens, inverse, to);
    s.low_dot[index][h] = hsum(lows[h] + lost * (MIDDLE_CODE<BITS> * unit));
  }
}

// out[h] += p[h] . V of one page for 16 * SUBS channels from `first` on.
template <int BITS, int H, int SUBS>
KVS_INLINE void weigh_columns(const Codes& codes, int first, int index, const Heads& heads, const PageScratch& s) {
  const int16_t* x = s.factors + index * H * codes.rows;
  const bool folded = BITS == 2 && SUBS == 2 && heads.head_dim - first / 64 * 64 < 64;
  for (int lane = 0; lane < LANES; lane += VL) {
    VF sums[H][SUBS];
    if (folded)
      dot_folded<BITS, H, SUBS>(codes, x, first, lane, s.unit[index], sums);
    else
      dot_columns<BITS, H, SUBS>(codes, {x, nullptr, codes.rows}, first, lane, s.unit[index], sums);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
      for (int i = 0; i < SUBS; ++i) {
        float* to = heads.out + h * heads.head_dim + first + i * LANES + lane;
        storeu(to, loadu(to) + (sums[h][i] + s.low_dot[index][h]));
      }
  }
}

// out[h] += sum over pages i and tokens t of weights[h][i * tile_tokens + t] * V[t]; the weights lie in scores.
template <int BITS, int H>
void weigh_pages(const KvsLayout& l, const Pages& pages, const Heads& heads, PageScratch& s) {
  const KvsCodec& codec = value_codec(l);
  const int group = group_of(codec, l.head_dim), groups = l.head_dim / group;
  for (int i = 0; i < pages.count; ++i) {
    pages.prefetch_quarter(i, 2);
    for (int g = 0; g < groups; ++g)
      weight_factors<BITS, H>(l, pages.pages[i], g, i * groups + g, s.scores + i * l.tile_tokens, s);
  }
  for (int i = 0; i < pages.count; ++i) {
    pages.prefetch_quarter(i, 3);
    const Codes codes{pages.pages[i] + codes_at(codec), nullptr, l.tile_tokens, 0};
    for (int g = 0; g < groups; ++g) {
      const int first = g * group, index = i * groups + g;
      int d = 0;
      for (; d + 64 <= group; d += 64) weigh_columns<BITS, H, 4>(codes, first + d, index, heads, s);
      for (; d < group; d += 32) weigh_columns<BITS, H, 2>(codes, first + d, index, heads, s);
    }
  }
}

}  // namespace kvs
