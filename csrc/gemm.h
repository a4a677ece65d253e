// fp32 micro-kernels of the extend kernel: strips of MR rows times panels of up to PANEL vectors.
// Written once with GCC vector extensions; VL (simd.h) is the width of the instruction set compiled for.
#pragma once
#include <cstddef>

#include "simd.h"

namespace kvs {

constexpr int MR = 6;                     // rows of one strip
constexpr int PANEL = VL == 16 ? 4 : 2;   // MR * PANEL accumulators fit the register file
constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;

// 2^x, relative error below 3e-7; exactly 1 at 0 and exactly 0 below -126.5. NaN stays NaN. x must be below 128.
KVS_INLINE VF vexp2(VF x) {
  const VF shifter = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are x rounded to an integer
  x = x < splat(-127.0f) ? splat(-127.0f) : x;
  const VF shifted = x + shifter;
  const VF f = x - (shifted - shifter);
  VF p = splat(1.34004322e-3f);
  p = p * f + splat(9.67217174e-3f);
  p = p * f + splat(5.55032721e-2f);
  p = p * f + splat(2.40222281e-1f);
  p = p * f + splat(6.93147207e-1f);
  p = p * f + splat(1.0f);
  const VI exponent = ((VI)shifted << 23) + 0x3f800000;
  return p * (VF)exponent;
}

// c[MR][NV vectors] = (scaled ? c * alpha[row] : 0) + a[MR][depth] * b[depth][NV vectors]
template <int NV, bool scaled>
inline void strip_panel(const float* a, ptrdiff_t lda, const float* b, ptrdiff_t ldb, int depth, float* c,
                        ptrdiff_t ldc, const float* alpha) {
  VF acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = scaled ? loadu(c + i * ldc + j * VL) * splat(alpha[i]) : VF{};
  for (int k = 0; k < depth; ++k, b += ldb, ++a) {
    VF row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) row[j] = loadu(b + j * VL);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const VF x = splat(a[i * lda]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) storeu(c + i * ldc + j * VL, acc[i][j]);
}

// One strip times `vectors` (1..PANEL) vectors.
template <bool scaled>
inline void strip(const float* a, ptrdiff_t lda, const float* b, ptrdiff_t ldb, int depth, float* c, ptrdiff_t ldc,
                  int vectors, const float* alpha) {
  switch (vectors) {
    case 1: return strip_panel<1, scaled>(a, lda, b, ldb, depth, c, ldc, alpha);
    case 2: return strip_panel<2, scaled>(a, lda, b, ldb, depth, c, ldc, alpha);
#if defined(__AVX512F__)
    case 3: return strip_panel<3, scaled>(a, lda, b, ldb, depth, c, ldc, alpha);
    case 4: return strip_panel<4, scaled>(a, lda, b, ldb, depth, c, ldc, alpha);
#endif
    default: return;
  }
}

// In-register transpose of a VL x VL block: log2(VL) rounds of a perfect shuffle of the rows.
KVS_INLINE void interleave(VF a, VF b, VF* low, VF* high) {
  VI first{}, second{};
  for (int i = 0; i < VL; ++i) {
    first[i] = i / 2 + (i % 2) * VL;
    second[i] = first[i] + VL / 2;
  }
  *low = __builtin_shuffle(a, b, first);
  *high = __builtin_shuffle(a, b, second);
}

inline void transpose_block(const float* from, ptrdiff_t from_stride, float* to, ptrdiff_t to_stride) {
  VF rows[VL], mixed[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) rows[i] = loadu(from + i * from_stride);
#pragma GCC unroll 4
  for (int round = 1; round < VL; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < VL / 2; ++i) interleave(rows[i], rows[i + VL / 2], &mixed[2 * i], &mixed[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) rows[i] = mixed[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) storeu(to + i * to_stride, rows[i]);
}

}  // namespace kvs
