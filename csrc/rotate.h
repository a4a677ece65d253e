// Orthonormal Walsh-Hadamard transform of one head row.
#pragma once
#include <cmath>

#include "simd.h"

namespace kvs {

// In place; n is a power of two and a multiple of 16. Its own inverse.
inline void hadamard(float* x, int n) {
  for (int half = 1; half < VL; half *= 2)
    for (int i = 0; i < n; i += 2 * half)
      for (int j = i; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
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

}  // namespace kvs
