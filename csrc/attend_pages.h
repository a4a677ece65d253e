// Attention of H heads over a few sealed pages at a time: in integers where a half's codec allows it, else by way of
// panels; each half by itself.
#pragma once
#include "decoded.h"
#include "geometry.h"
#include "sealed.h"

namespace kvs {

using PagesOp = void (*)(const KvsLayout&, const Pages&, const Heads&, PageScratch&);

// For 1 to 4 heads.
template <int BITS>
constexpr PagesOp SCORE_PAGES[] = {score_pages<BITS, 1>, score_pages<BITS, 2>, score_pages<BITS, 3>,
                                   score_pages<BITS, 4>};
template <int BITS>
constexpr PagesOp WEIGH_PAGES[] = {weigh_pages<BITS, 1>, weigh_pages<BITS, 2>, weigh_pages<BITS, 3>,
                                   weigh_pages<BITS, 4>};
constexpr PagesOp SCORE_DECODED[] = {score_decoded<1>, score_decoded<2>, score_decoded<3>, score_decoded<4>};
constexpr PagesOp WEIGH_DECODED[] = {weigh_decoded<1>, weigh_decoded<2>, weigh_decoded<3>, weigh_decoded<4>};

inline const PagesOp* score_ops(const KvsLayout& l) {
  if (!is_affine_by_channel(l.key)) return SCORE_DECODED;
  const int bits = bits_of(key_codec(l));
  return bits == 2 ? SCORE_PAGES<2> : bits == 4 ? SCORE_PAGES<4> : SCORE_PAGES<8>;
}
inline const PagesOp* weigh_ops(const KvsLayout& l) {
  if (!is_affine_by_token(l.value)) return WEIGH_DECODED;
  const int bits = bits_of(value_codec(l));
  return bits == 2 ? WEIGH_PAGES<2> : bits == 4 ? WEIGH_PAGES<4> : WEIGH_PAGES<8>;
}

inline void add_masses(const KvsLayout& l, const Pages& pages, int heads, float* scores) {
  for (int i = 0; i < pages.count; ++i) {
    const float* mass = masses_of(l, pages.pages[i]);
    for (int t = 0; t < l.tile_tokens; t += VL) {
      const VF m = loadu(mass + t);
      for (int h = 0; h < heads; ++h) {
        float* score = scores + h * MAX_TOKENS + i * l.tile_tokens + t;
        storeu(score, loadu(score) + m);
      }
    }
  }
}

inline void mask_tokens(float* scores, int heads, int first, int last) {
  for (int h = 0; h < heads; ++h)
    for (int t = first; t < last; ++t) scores[h * MAX_TOKENS + t] = NEG_INF;
}

// Tokens [first, last) of the pages, at least one, for `count` <= MAX_HEADS heads.
inline void attend_pages(const KvsLayout& l, const Pages& pages, const Heads& heads, int count, int first, int last,
                         PageScratch& s) {
  score_ops(l)[count - 1](l, pages, heads, s);
  if (heads.soft_cap) cap_scores(s.scores, count, pages.count * l.tile_tokens, heads.soft_cap);
  if (l.mass) add_masses(l, pages, count, s.scores);
  mask_tokens(s.scores, count, 0, first);
  mask_tokens(s.scores, count, last, pages.count * l.tile_tokens);
  float rescale[MAX_HEADS];
  softmax(heads, count, s.scores, pages.count * l.tile_tokens, rescale);
  for (int h = 0; h < count; ++h) {
    if (rescale[h] == 1.0f) continue;
    float* out = heads.out + h * heads.head_dim;
    for (int i = 0; i < heads.head_dim; i += VL) storeu(out + i, loadu(out + i) * rescale[h]);
  }
  weigh_ops(l)[count - 1](l, pages, heads, s);
}

}  // namespace kvs
