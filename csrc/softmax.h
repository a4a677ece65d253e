// Running softmax of up to MAX_HEADS query heads that share one KV head.
#pragma once
#include <cmath>

#include "simd.h"

namespace kvs {

constexpr int MAX_HEADS = 4;    // processed together; larger groups are split
constexpr int MAX_TOKENS = 4 * 128 + 16;  // scored together; heads do not lie a power of two apart
constexpr int MAX_SEALED_DIM = 256;

// Heads of one group: rows of q (times the softmax scale) and out (unnormalised), head_dim apart.
struct Heads {
  const float* q;
  float* out;
  float* max;  // of the scores so far
  float* sum;  // of exp(score - max)
  int head_dim;
  float soft_cap;  // of scores; 0: none
};

inline Heads heads_from(const Heads& all, int first) {
  return {all.q + first * all.head_dim, all.out + first * all.head_dim, all.max + first, all.sum + first, all.head_dim,
          all.soft_cap};
}

// Caps the first n (rounded up to vectors) scores of `count` heads, [count][MAX_TOKENS].
KVS_NOINLINE inline void cap_scores(float* scores, int count, int n, float soft_cap) {
  for (int h = 0; h < count; ++h)
    for (int t = 0; t < n; t += VL) {
      float* score = scores + h * MAX_TOKENS + t;
      storeu(score, soft_capped(loadu(score), soft_cap));
    }
}

// Turns scores [H][MAX_TOKENS] into exp(score - new max), in place; n is a multiple of VL, and unseen tokens are -inf.
// At least one token is seen. rescale[h]: factor that `out` still needs.
template <int H>
KVS_INLINE void softmax_step(const Heads& heads, float* scores, int n, float (&rescale)[H]) {
  VF top[H], total[H] = {};
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) top[h] = loadu(scores + h * MAX_TOKENS);
  for (int t = VL; t < n; t += VL)
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) top[h] = vmax(top[h], loadu(scores + h * MAX_TOKENS + t));
  float after[H];
  for (int h = 0; h < H; ++h) after[h] = std::fmax(heads.max[h], hmax(top[h]));
  for (int t = 0; t < n; t += VL)
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const VF p = vexp(loadu(scores + h * MAX_TOKENS + t) - after[h]);
      storeu(scores + h * MAX_TOKENS + t, p);
      total[h] += p;
    }
  for (int h = 0; h < H; ++h) {
    rescale[h] = heads.max[h] == after[h] ? 1.0f : std::exp(heads.max[h] - after[h]);
    heads.max[h] = after[h];
    heads.sum[h] = heads.sum[h] * rescale[h] + hsum(total[h]);
  }
}

template <int H>
void softmax_of(const Heads& heads, float* scores, int n, float* rescale) {
  softmax_step<H>(heads, scores, n, *(float(*)[H])rescale);
}

// softmax_step for `count` <= MAX_HEADS heads; rescale: [MAX_HEADS].
inline void softmax(const Heads& heads, int count, float* scores, int n, float* rescale) {
  if (count == 1) return softmax_of<1>(heads, scores, n, rescale);
  if (count == 2) return softmax_of<2>(heads, scores, n, rescale);
  if (count == 3) return softmax_of<3>(heads, scores, n, rescale);
  softmax_of<4>(heads, scores, n, rescale);
}

}  // namespace kvs
