// Orthonormal rotation of one head row (`hadamard` in kvserve/pages/reference.py).
#pragma once
#include <cmath>

#include "simd.h"

namespace kvs {

// Lane i becomes x[i] + x[i + half], or x[i - half] - x[i] where i has that bit.
template <int half>
KVS_INLINE VF lane_butterfly(VF x) {
  VI partner{};
  VF sign{};
  for (int i = 0; i < VL; ++i) {
    partner[i] = i ^ half;
    sign[i] = i & half ? -1.0f : 1.0f;
  }
  return __builtin_shuffle(x, partner) + x * sign;
}

KVS_INLINE VF lane_butterflies(VF x) {
  x = lane_butterfly<2>(lane_butterfly<1>(x));
  if constexpr (VL >= 8) x = lane_butterfly<4>(x);
  if constexpr (VL >= 16) x = lane_butterfly<8>(x);
  return x;
}

// In place; n is a power of two and a multiple of 16. Its own inverse.
inline void walsh_hadamard(float* x, int n) {
  for (int i = 0; i < n; i += VL) storeu(x + i, lane_butterflies(loadu(x + i)));
  for (int half = VL; half < n; half *= 2)
    for (int i = 0; i < n; i += 2 * half)
      for (int j = i; j < i + half; j += VL) {
        const VF a = loadu(x + j), b = loadu(x + j + half);
        storeu(x + j, a + b);
        storeu(x + j + half, a - b);
      }
  const float norm = 1.0f / std::sqrt(float(n));
  for (int i = 0; i < n; i += VL) storeu(x + i, loadu(x + i) * norm);
}

// In place; n is a multiple of 16. Blocks of the largest power of two that divides it.
inline void hadamard(float* x, int n) {
  const int size = n & -n;
  for (int i = 0; i < n; i += size) walsh_hadamard(x + i, size);
}

}  // namespace kvs
