// Running softmax of up to MAX_HEADS query heads that share one KV head.
#pragma once
#include <cmath>

#include "simd.h"

namespace kvs {

constexpr int MAX_HEADS = 4;    // processed together; larger groups are split
constexpr int MAX_TOKENS = 128; // scored together
constexpr int MAX_SEALED_DIM = 256;

// Heads of one group: rows of q (times the softmax scale) and out (unnormalised), head_dim apart.
struct Heads {
  const float* q;
  float* out;
  float* max;  // of the scores so far
  float* sum;  // of exp(score - max)
  int head_dim;
};

inline Heads heads_from(const Heads& all, int first) {
  return {all.q + first * all.head_dim, all.out + first * all.head_dim, all.max + first, all.sum + first, all.head_dim};
}

// Turns scores [H][MAX_TOKENS] into exp(score - new max), in place; n is a multiple of VL, and unseen tokens are -inf.
// At least one token is seen. rescale[h]: factor that `out` still needs.
template <int H>
KVS_INLINE void softmax_step(const Heads& heads, float* scores, int n, float (&rescale)[H]) {
  for (int h = 0; h < H; ++h) {
    float* s = scores + h * MAX_TOKENS;
    VF top = loadu(s);
    for (int t = VL; t < n; t += VL) top = vmax(top, loadu(s + t));
    const float before = heads.max[h], after = std::fmax(before, hmax(top));
    VF total = {};
    for (int t = 0; t < n; t += VL) {
      const VF p = vexp(loadu(s + t) - after);
      storeu(s + t, p);
      total += p;
    }
    rescale[h] = before == after ? 1.0f : std::exp(before - after);
    heads.max[h] = after;
    heads.sum[h] = heads.sum[h] * rescale[h] + hsum(total);
  }
}

}  // namespace kvs
