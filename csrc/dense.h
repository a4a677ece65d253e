// Attention of H heads over dense rows: up to DENSE_TOKENS tokens at a time, each given by the address of its K row.
#pragma once
#include "softmax.h"

namespace kvs {

constexpr int DENSE_TOKENS = 32;

// Rows of one dtype; the V row of a token lies value_offset bytes after its K row.
struct DenseRows {
  const uint8_t* const* rows;
  int count;  // <= DENSE_TOKENS
  int64_t value_offset;
};

// Slots waiting for attention; a batch is prefetched while the one before it is computed.
struct SlotQueue {
  const uint8_t* slots[2 * DENSE_TOKENS];
  int32_t places[2 * DENSE_TOKENS];  // of each token among those of its task
  int count = 0;

  bool full() const { return count == 2 * DENSE_TOKENS; }
  void push(const uint8_t* slot, int64_t bytes, int32_t place) {
    prefetch(slot, bytes);
    slots[count] = slot;
    places[count++] = place;
  }
  // Drops the first n.
  void pop(int n) {
    for (int i = n; i < count; ++i) slots[i - n] = slots[i], places[i - n] = places[i];
    count -= n;
  }
};

// scores[h][t .. t + N) = q[h] . K[t ..]
template <int DTYPE, int H, int N>
KVS_INLINE void score_rows(const DenseRows& d, int t, const Heads& heads, float* scores) {
  VF acc[N][H] = {};
  for (int i = 0; i < heads.head_dim; i += VL) {
    VF q[H];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) q[h] = loadu(heads.q + h * heads.head_dim + i);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const VF k = load_as<DTYPE>(d.rows[t + n] + i * dtype_bytes<DTYPE>);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) acc[n][h] += q[h] * k;
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) scores[h * MAX_TOKENS + t + n] = hsum(acc[n][h]);
}

// out[h][i .. i + N * VL) = out * rescale[h] + sum over t of weights[h][t] * V[t]
template <int DTYPE, int H, int N>
KVS_INLINE void weigh_rows(const DenseRows& d, int i, const Heads& heads, const float* weights,
                           const float (&rescale)[H]) {
  VF acc[H][N];
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[h][n] = loadu(heads.out + h * heads.head_dim + i + n * VL) * rescale[h];
  for (int t = 0; t < d.count; ++t) {
    const uint8_t* row = d.rows[t] + d.value_offset + i * dtype_bytes<DTYPE>;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const VF v = load_as<DTYPE>(row + n * VL * dtype_bytes<DTYPE>);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) acc[h][n] += v * weights[h * MAX_TOKENS + t];
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) storeu(heads.out + h * heads.head_dim + i + n * VL, acc[h][n]);
}

template <int DTYPE, int H>
void attend_rows(const DenseRows& d, const Heads& heads, float* scores) {
  constexpr int TOKENS = VL == 16 ? 4 : 2, VECTORS = VL == 16 ? 4 : 2;
  int t = 0;
  for (; t + TOKENS <= d.count; t += TOKENS) score_rows<DTYPE, H, TOKENS>(d, t, heads, scores);
  for (; t < d.count; ++t) score_rows<DTYPE, H, 1>(d, t, heads, scores);
  if (heads.soft_cap) cap_scores(scores, H, d.count, heads.soft_cap);
  const int padded = (d.count + VL - 1) / VL * VL;
  for (int h = 0; h < H; ++h)
    for (t = d.count; t < padded; ++t) scores[h * MAX_TOKENS + t] = NEG_INF;
  float rescale[H];
  softmax_step<H>(heads, scores, padded, rescale);
  int i = 0;
  for (; i + VECTORS * VL <= heads.head_dim; i += VECTORS * VL)
    weigh_rows<DTYPE, H, VECTORS>(d, i, heads, scores, rescale);
  for (; i < heads.head_dim; i += VL) weigh_rows<DTYPE, H, 1>(d, i, heads, scores, rescale);
}

template <int DTYPE>
inline void attend_rows_of(const DenseRows& d, const Heads& heads, int count, float* scores) {
  if (count == 1) return attend_rows<DTYPE, 1>(d, heads, scores);
  if (count == 2) return attend_rows<DTYPE, 2>(d, heads, scores);
  if (count == 3) return attend_rows<DTYPE, 3>(d, heads, scores);
  attend_rows<DTYPE, 4>(d, heads, scores);
}

// Every row of `d` for `count` <= MAX_HEADS heads; scores: [MAX_HEADS][MAX_TOKENS].
inline void attend_dense(const DenseRows& d, int32_t dtype, const Heads& heads, int count, float* scores) {
  if (d.count == 0) return;
  if (dtype == KVS_F32) return attend_rows_of<KVS_F32>(d, heads, count, scores);
  if (dtype == KVS_F16) return attend_rows_of<KVS_F16>(d, heads, count, scores);
  attend_rows_of<KVS_BF16>(d, heads, count, scores);
}

}  // namespace kvs
