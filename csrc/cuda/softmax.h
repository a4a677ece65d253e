// The running softmax of one warp over the tokens it has seen, for 8 query heads of one KV head, in base 2.
//
// Scores and weights of 16 tokens are a C fragment: c[0], c[1] are token 2g of heads 2t and 2t + 1, c[2], c[3] token
// 2g + 1. Transposed, they are the B fragment of the product with the values: tokens 4t, 4t + 2 and 4t + 1, 4t + 3 of
// head g, which is the order of rows in codes.h.
#pragma once
#include "codes.h"

namespace kvs::gpu {

constexpr int HEADS = 8;  // query heads of one block: the N of an mma
constexpr float NOTHING = -__builtin_inff();

// One lane's share. Numbers [2] are of heads 2t and 2t + 1.
template <int DIM>
struct State {
  float output[DIM / TILE][4];  // channels 2g ([0], [1]) and 2g + 1 ([2], [3]) of 16
  float offset[DIM / 32][2];    // of all of 32 channels; to be summed over g
  float peak[2];                // largest score
  float total[2];               // sum of the weights; to be summed over g
};

template <int DIM>
KVS_LANE void clear(State<DIM>& state) {
#pragma unroll
  for (int m = 0; m < DIM / TILE; ++m)
    for (int i = 0; i < 4; ++i) state.output[m][i] = 0.0f;
#pragma unroll
  for (int u = 0; u < DIM / 32; ++u) state.offset[u][0] = state.offset[u][1] = 0.0f;
  state.peak[0] = state.peak[1] = NOTHING;
  state.total[0] = state.total[1] = 0.0f;
}

KVS_LANE float max_of(float x, float y) { return x > y ? x : y; }

// Over the 8 lanes of the same t.
KVS_LANE float largest_over_g(float x) {
  for (int mask = 4; mask < 32; mask *= 2) x = max_of(x, shuffle_xor(x, mask));
  return x;
}
KVS_LANE float sum_over_g(float x) {
  for (int mask = 4; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}

template <int DIM>
KVS_LANE void shrink(State<DIM>& state, const float (&factor)[2]) {
#pragma unroll
  for (int m = 0; m < DIM / TILE; ++m)
    for (int i = 0; i < 4; ++i) state.output[m][i] *= factor[i & 1];
#pragma unroll
  for (int u = 0; u < DIM / 32; ++u)
    for (int i = 0; i < 2; ++i) state.offset[u][i] *= factor[i];
  for (int i = 0; i < 2; ++i) state.total[i] *= factor[i];
}

// Turns scores, -infinity where a token is hidden, into weights, and makes room for them in the state.
template <int DIM, int COUNT>
KVS_LANE void take_scores(State<DIM>& state, float (&scores)[COUNT][4]) {
  float factor[2], least[2];
  for (int i = 0; i < 2; ++i) {
    float peak = state.peak[i];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) peak = max_of(peak, max_of(scores[n][i], scores[n][i + 2]));
    peak = largest_over_g(peak);
    least[i] = peak == NOTHING ? 0.0f : peak;
    factor[i] = exp2_of(state.peak[i] - least[i]);
    state.peak[i] = peak;
  }
  shrink(state, factor);
#pragma unroll
  for (int n = 0; n < COUNT; ++n)
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = exp2_of(scores[n][i] - least[i & 1]);
      state.total[i & 1] += scores[n][i];
    }
}

// The B fragment of the weights of 16 tokens.
template <class Number>
KVS_LANE void pack_weights(uint32_t (&b)[2], const float (&weights)[4]) {
  b[0] = transpose(Number::pack(weights[0], weights[1]));
  b[1] = transpose(Number::pack(weights[2], weights[3]));
}

}  // namespace kvs::gpu
