// Vectors of the instruction set this file is compiled for. Intrinsics live here and nowhere else.
#pragma once
#include <cstdint>
#include <cstring>

#include "kvserve.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define KVS_INLINE inline __attribute__((always_inline))
#define KVS_NOINLINE __attribute__((noinline))  // what few layers need leaves the loops of all others as they are

#if defined(__AVX512F__)
#define KVS_ISA "avx512"
#define KVS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KVS_ISA "avx2"
#define KVS_VECTOR_BYTES 32
#else
#define KVS_ISA "portable"
#define KVS_VECTOR_BYTES 16
#endif

namespace kvs {

constexpr int VL = KVS_VECTOR_BYTES / 4;  // lanes of a float vector; divides every head_dim (a multiple of 16)
constexpr float NEG_INF = -__builtin_inff();
constexpr float F16_MAX = 65504.0f;

typedef float VF __attribute__((vector_size(KVS_VECTOR_BYTES)));
typedef int32_t VI __attribute__((vector_size(KVS_VECTOR_BYTES)));

KVS_INLINE VF splat(float x) { return x - VF{}; }  // x - 0 keeps every x, -0 and infinities included
KVS_INLINE VF loadu(const float* p) {
  VF v;
  memcpy(&v, p, sizeof v);
  return v;
}
KVS_INLINE void storeu(float* p, VF v) { memcpy(p, &v, sizeof v); }
// The second operand where one is NaN.
KVS_INLINE VF vmax(VF a, VF b) {
#if defined(__AVX512F__)
  return (VF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
KVS_INLINE VF vmin(VF a, VF b) {
#if defined(__AVX512F__)
  return (VF)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VF)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
KVS_INLINE VF vabs(VF x) { return (VF)((VI)x & 0x7fffffff); }
// Nearest, ties to even; for |x| < 2^22.
KVS_INLINE VF vround(VF x) { return (x + 12582912.0f) - 12582912.0f; }

// x as it is rounded: keeps the compiler from fusing a product with the addition it enters, so that encoders give the
// bytes that the reference gives.
KVS_INLINE VF rounded(VF x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}
// table[i] of each lane, for i < 2^BITS.
template <int BITS>
struct LookUp {
  static constexpr int SIZE = 1 << BITS, VECTORS = SIZE > VL ? SIZE / VL : 1;
  VF parts[VECTORS];

  explicit LookUp(const float* table) {
    float padded[SIZE > VL ? SIZE : VL] = {};
    memcpy(padded, table, SIZE * sizeof(float));
    for (int i = 0; i < VECTORS; ++i) parts[i] = loadu(padded + i * VL);
  }
  KVS_INLINE VF operator()(VI index) const {
    VF found = __builtin_shuffle(parts[0], index);  // takes the index modulo VL
#pragma GCC unroll 4
    for (int i = 1; i < VECTORS; ++i) found = index >= i * VL ? __builtin_shuffle(parts[i], index) : found;
    return found;
  }
};

// Cache lines of [p, p + bytes), to the second level: a burst into the first one stalls the loads behind it.
KVS_INLINE void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Scalar conversions ------------------------------------------------------------------------------------------------

KVS_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
KVS_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
KVS_INLINE float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }
KVS_INLINE uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
KVS_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t magnitude = h & 0x7fff, sign = uint32_t(h & 0x8000) << 16;
  // Multiplying by 2^112 rebases the exponent and normalises subnormals; Inf and NaN are patched.
  uint32_t u = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7c00) u |= 0x7f800000;
  return bits_to_float(u | sign);
#endif
}
// Nearest, ties to even; overflow to infinity.
KVS_INLINE uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000)  // subnormal: the float adder rounds at bit 2^-24
    return uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
#endif
}
// float16 saturates; NaN stays NaN.
KVS_INLINE uint16_t float_to_half_saturated(float f) {
  return float_to_half(f > F16_MAX ? F16_MAX : f < -F16_MAX ? -F16_MAX : f);
}

// Loads that widen to float32, and stores that round (float16 saturating) ----------------------------------------------

KVS_INLINE VF load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  VF v;
  for (int i = 0; i < VL; ++i) v[i] = half_to_float(p[i]);
  return v;
#endif
}
KVS_INLINE VF load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (VF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (VF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  VI v;
  for (int i = 0; i < VL; ++i) v[i] = int32_t(uint32_t(p[i]) << 16);
  return (VF)v;
#endif
}

template <int DTYPE>
constexpr int dtype_bytes = DTYPE == KVS_F32 ? 4 : 2;

// VL elements of DTYPE at byte address p.
template <int DTYPE>
KVS_INLINE VF load_as(const void* p) {
  if constexpr (DTYPE == KVS_F32) return loadu((const float*)p);
  if constexpr (DTYPE == KVS_F16) return load_half((const uint16_t*)p);
  if constexpr (DTYPE == KVS_BF16) return load_bf16((const uint16_t*)p);
}

KVS_INLINE void store_half_saturated(uint16_t* p, VF v) {
#if defined(__AVX512F__)
  const VF x = v > F16_MAX ? splat(F16_MAX) : (v < -F16_MAX ? splat(-F16_MAX) : v);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  const VF x = v > F16_MAX ? splat(F16_MAX) : (v < -F16_MAX ? splat(-F16_MAX) : v);
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VL; ++i) p[i] = float_to_half_saturated(v[i]);
#endif
}

// n elements (a multiple of VL) from float32 to dtype, and back.
KVS_INLINE void store_row(void* to, const float* from, int n, int32_t dtype) {
  if (dtype == KVS_F32) {
    memcpy(to, from, size_t(n) * 4);
  } else if (dtype == KVS_F16) {
    for (int i = 0; i < n; i += VL) store_half_saturated((uint16_t*)to + i, loadu(from + i));
  } else {
    for (int i = 0; i < n; ++i) ((uint16_t*)to)[i] = float_to_bf16(from[i]);
  }
}
KVS_INLINE void load_row(float* to, const void* from, int n, int32_t dtype) {
  if (dtype == KVS_F32) {
    memcpy(to, from, size_t(n) * 4);
  } else if (dtype == KVS_F16) {
    for (int i = 0; i < n; i += VL) storeu(to + i, load_half((const uint16_t*)from + i));
  } else {
    for (int i = 0; i < n; i += VL) storeu(to + i, load_bf16((const uint16_t*)from + i));
  }
}

// Reductions and exp --------------------------------------------------------------------------------------------------

KVS_INLINE float hsum(VF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  float s = 0;
  for (int i = 0; i < VL; ++i) s += v[i];
  return s;
#endif
}
KVS_INLINE float hmax(VF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 s = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
#else
  float s = v[0];
  for (int i = 1; i < VL; ++i) s = v[i] > s ? v[i] : s;
  return s;
#endif
}

// exp for x <= 88, relative error about 2e-7; exactly 0 for x < -87, -inf included.
KVS_INLINE VF vexp(VF x) {
  const VF clamped = vmax(x, splat(-87.0f));
  const VF shifted = clamped * 1.44269504f + 12582912.0f;  // low mantissa bits: round(x / ln 2)
  const VF n = shifted - 12582912.0f;
  const VF r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  VF y = r * 1.3888889e-3f + 8.3333333e-3f;
  y = y * r + 4.1666667e-2f;
  y = y * r + 1.6666667e-1f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  y = (VF)((VI)y + ((VI)shifted << 23));
  return x < -87.0f ? VF{} : y;
}

// cap * tanh(x / cap); absolute error about 2e-7 * cap, relative error about 5e-7. NaN stays NaN.
KVS_INLINE VF soft_capped(VF x, float cap) {
  const VF y = x * splat(1.0f / cap), magnitude = vabs(y), e = vexp(magnitude * -2.0f);
  const VI ratio = (VI)((1.0f - e) / (1.0f + e)) | ((VI)y & int32_t(0x80000000));
  const VF square = y * y;  // the Taylor series where the ratio cancels
  VF series = square * 2.1869489e-2f - 5.3968254e-2f;
  series = series * square + 1.3333333e-1f;
  series = series * square - 3.3333333e-1f;
  series = series * square * y + y;
  return (magnitude >= 0.25f ? (VF)ratio : series) * cap;
}

// Integer dots over packed codes --------------------------------------------------------------------------------------
// A lane of VI holds one column: a byte of codes for each of four rows.

constexpr int LANES = 16;  // columns of one plane of codes, whatever VL is

KVS_INLINE VI load_words(const void* p) {
  VI v;
  memcpy(&v, p, sizeof v);
  return v;
}
// Rows 1 and 3 to where rows 0 and 2 were.
KVS_INLINE VI shift_bytes(VI words) {
  typedef uint16_t Halves __attribute__((vector_size(KVS_VECTOR_BYTES)));
  return (VI)((Halves)words >> 8);
}
// Two adjacent factors in every lane.
KVS_INLINE VI broadcast_pair(const int16_t* x) {
  int32_t pair;
  memcpy(&pair, x, 4);
  return pair - VI{};
}
// acc += codes[low half] * x[low half] + codes[high half] * x[high half], per lane.
KVS_INLINE VI dot2(VI acc, VI codes, VI x) {
#if defined(__AVX512VNNI__)
  return (VI)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
#elif defined(__AVX2__)
  return acc + (VI)_mm256_madd_epi16((__m256i)codes, (__m256i)x);
#else
  return acc + ((codes << 16) >> 16) * ((x << 16) >> 16) + (codes >> 16) * (x >> 16);
#endif
}
KVS_INLINE VF to_float(VI v) { return __builtin_convertvector(v, VF); }
// Round VL floats of magnitude at most 32767 to integers, and store them as int16, each four in the order 0, 2, 1, 3
// that dot2 wants them in; returns the integers.
KVS_INLINE VI store_factors(int16_t* p, VF v) {
#if defined(__AVX512F__)
  const __m512i rounded = _mm512_cvtps_epi32((__m512)v);
  const __m256i i = _mm512_cvtepi32_epi16(rounded);
  _mm256_storeu_si256((__m256i*)p, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(i, 0xd8), 0xd8));
#elif defined(__AVX2__)
  const __m256i rounded = _mm256_cvtps_epi32((__m256)v);
  const __m128i i = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128((__m128i*)p, _mm_shufflehi_epi16(_mm_shufflelo_epi16(i, 0xd8), 0xd8));
#else
  const VI rounded = __builtin_convertvector(vround(v), VI);
  for (int i = 0; i < VL; i += 4)
    for (int j = 0; j < 4; ++j) p[i + j] = int16_t(rounded[i + (j == 1 ? 2 : j == 2 ? 1 : j)]);
#endif
  return (VI)rounded;
}

}  // namespace kvs
