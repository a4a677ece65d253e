// Scores and weighted sums of sealed pages by way of their panels: any codec, one loop of float32 products.
#pragma once
#include "codecs/codec.h"
#include "pages.h"

namespace kvs {

// acc[h] += sum over k of a[h][k] * panel[k][64], NV vectors of it
template <int H, int NV>
KVS_INLINE void add_panel(VF (&acc)[H][NV], const float* a, int stride, const float* panel, int depth) {
  for (int k = 0; k < depth; ++k, panel += COLUMNS) {
    VF row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = loadu(panel + v * VL);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[h][v] += a[h * stride + k] * row[v];
  }
}

// out[h][0 .. 16 * SUBS) = (ADD ? out : 0) + a[h] * panel
template <int H, int SUBS, bool ADD>
KVS_INLINE void multiply_panel(const float* a, int stride, const float* panel, int depth, float* out, int out_stride) {
  constexpr int NV = VL == 16 ? SUBS : 2;
  for (int column = 0; column < SUBS * LANES; column += NV * VL) {
    VF acc[H][NV] = {};
    if (ADD)
      for (int h = 0; h < H; ++h)
        for (int v = 0; v < NV; ++v) acc[h][v] = loadu(out + h * out_stride + column + v * VL);
    add_panel<H, NV>(acc, a, stride, panel + column, depth);
    for (int h = 0; h < H; ++h)
      for (int v = 0; v < NV; ++v) storeu(out + h * out_stride + column + v * VL, acc[h][v]);
  }
}

// The panels of page i, decoded unless heads before these have done it.
KVS_INLINE const float* panels_of(const HalfTile& tile, const Pages& pages, int i, DecodedPages& decoded) {
  float* panels = decoded.of_page(i);
  if (!decoded.done) decode_panels(tile, pages.pages[i], panels);
  return panels;
}

// scores[h][i * tile_tokens + t] = q[h] . K[t] of page i
template <int H>
void score_decoded(const KvsLayout& l, const Pages& pages, const Heads& heads, PageScratch& s) {
  for (int i = 0; i < pages.count; ++i) {
    const int first = i * l.tile_tokens;
    const float* panels =
        panels_of(key_tile(l, pages.kv_head, pages.first_position + first), pages, i, s.keys);
    for (int quarter : {0, 1}) pages.prefetch_quarter(i, quarter);
    for (int t = 0; t < l.tile_tokens; t += COLUMNS, panels += l.head_dim * COLUMNS)
      multiply_panel<H, 4, false>(heads.q, l.head_dim, panels, l.head_dim, s.scores + first + t, MAX_TOKENS);
  }
  s.keys.done = s.keys.each_page;
}

// out[h] += sum over pages i and tokens t of weights[h][i * tile_tokens + t] * V[t]; the weights lie in scores.
template <int H>
void weigh_decoded(const KvsLayout& l, const Pages& pages, const Heads& heads, PageScratch& s) {
  for (int i = 0; i < pages.count; ++i) {
    const int first = i * l.tile_tokens;
    const float* panels =
        panels_of(value_tile(l, pages.kv_head, pages.first_position + first), pages, i, s.values);
    for (int quarter : {2, 3}) pages.prefetch_quarter(i, quarter);
    const float* weights = s.scores + first;
    int d = 0;
    for (; d + COLUMNS <= l.head_dim; d += COLUMNS, panels += l.tile_tokens * COLUMNS)
      multiply_panel<H, 4, true>(weights, MAX_TOKENS, panels, l.tile_tokens, heads.out + d, l.head_dim);
    if (d < l.head_dim)  // a multiple of 32
      multiply_panel<H, 2, true>(weights, MAX_TOKENS, panels, l.tile_tokens, heads.out + d, l.head_dim);
  }
  s.values.done = s.values.each_page;
}

}  // namespace kvs
