// The attention that tokens receive from a decode step, for KvsReceived.
//
// The softmax denominator is known only when all tokens of a KV head are done, so each task keeps what its tokens got
// relative to its own maximum: 4 bytes a query head and token, of one layer at a time.
#pragma once
#include <cmath>

#include "softmax.h"

namespace kvs {

// exp(score - max) of one task's tokens; `max` is the task's so far.
struct Trace {
  float* weights = nullptr;  // [group][width], zero at first; null: nobody asked
  int32_t width = 0;

  // Takes in `n` tokens just attended to by `count` heads from `first_head` on; the first one has place `place`, or
  // token t has places[t]. before[h]: the maximum before these tokens.
  void take(const Heads& heads, int first_head, int count, const float* before, const float* scores, int n,
            int32_t place, const int32_t* places = nullptr) const {
    for (int h = 0; h < count; ++h) {
      float* row = weights + int64_t(first_head + h) * width;
      if (heads.max[h] != before[h]) {
        const float rescale = std::exp(before[h] - heads.max[h]);
        for (int32_t i = 0; i < width; ++i) row[i] *= rescale;
      }
      for (int t = 0; t < n; ++t) row[places ? places[t] : place + t] += scores[h * MAX_TOKENS + t];
    }
  }

  // sums[t] += sum over heads of probability ** power, for `n` tokens from place `first` on. max: the task's, lse: of
  // all tokens.
  void add_to(float* sums, int32_t first, int32_t n, int group, const float* max, const float* lse, int power) const {
    for (int h = 0; h < group; ++h) {
      const float* row = weights + int64_t(h) * width + first;
      const float factor = std::exp(max[h] - lse[h]);
      for (int32_t t = 0; t < n; ++t) {
        const float p = row[t] * factor;
        sums[t] += power == 2 ? p * p : p;
      }
    }
  }
};

}  // namespace kvs
