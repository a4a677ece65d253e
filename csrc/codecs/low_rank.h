// KVS_LOW_RANK: kvserve/codecs/low_rank.py, up to rounding.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>

#include "panels.h"

namespace kvs {

constexpr int MAX_RANK = 8;
constexpr int ROUNDS = 3;                  // of the subspace iteration
constexpr float LEAST_REST = 0x1p-10f;     // a direction with a smaller rest is that of rounding errors

struct LowRankScratch {
  float error[MAX_TILE * MAX_DIM], panels[MAX_TILE * MAX_DIM], decoded[MAX_TILE * MAX_DIM];
  float directions[MAX_RANK * MAX_DIM], products[MAX_TILE * MAX_RANK];  // [rank][head_dim], [token][rank]
};

KVS_INLINE float dot(const float* x, const float* y, int n) {
  VF sum{};
  for (int i = 0; i < n; i += VL) sum += loadu(x + i) * loadu(y + i);
  return hsum(sum);
}
// to += x * factor
KVS_INLINE void add_scaled(float* to, const float* x, float factor, int n) {
  for (int i = 0; i < n; i += VL) storeu(to + i, loadu(to + i) + loadu(x + i) * factor);
}
KVS_INLINE void scale(float* x, float factor, int n) {
  for (int i = 0; i < n; i += VL) storeu(x + i, loadu(x + i) * factor);
}

// Where the iteration starts: columns of Sylvester's Hadamard matrix, or of a cosine transform.
inline void first_directions(float* directions, int rank, int dim) {
  const bool power_of_two = (dim & (dim - 1)) == 0;
  for (int r = 0; r < rank; ++r)
    for (int i = 0; i < dim; ++i)
      directions[r * dim + i] = power_of_two ? (__builtin_popcount(i & r) % 2 ? -1.0f : 1.0f)
                                             : float(std::cos(M_PI * (2 * i + 1) * r / (2 * dim)));
}

// Gram-Schmidt, twice over each direction; one that depends on those before it becomes 0.
inline void make_orthonormal(float* directions, int rank, int dim) {
  for (int r = 0; r < rank; ++r) {
    float* own = directions + r * dim;
    scale(own, 1.0f / std::max(std::sqrt(dot(own, own, dim)), 1.17549435e-38f), dim);
    for (int pass = 0; pass < 2; ++pass)
      for (int other = 0; other < r; ++other)
        add_scaled(own, directions + other * dim, -dot(directions + other * dim, own, dim), dim);
    const float length = std::sqrt(dot(own, own, dim));
    scale(own, length > LEAST_REST ? 1.0f / length : 0.0f, dim);
  }
}

// products[t][r] = error[t] . directions[r]
inline void project(const HalfTile& t, int rank, LowRankScratch& s) {
  for (int token = 0; token < t.tokens; ++token)
    for (int r = 0; r < rank; ++r)
      s.products[token * rank + r] = dot(s.error + token * t.head_dim, s.directions + r * t.head_dim, t.head_dim);
}

inline void fit_directions(const HalfTile& t, int rank, LowRankScratch& s) {
  const int dim = t.head_dim;
  first_directions(s.directions, rank, dim);
  for (int round = 0; round < ROUNDS; ++round) {
    project(t, rank, s);
    std::fill(s.directions, s.directions + rank * dim, 0.0f);
    for (int token = 0; token < t.tokens; ++token)
      for (int r = 0; r < rank; ++r)
        add_scaled(s.directions + r * dim, s.error + token * dim, s.products[token * rank + r], dim);
    make_orthonormal(s.directions, rank, dim);
  }
}

inline void encode_low_rank(const HalfTile& t, int stage, float* rows, uint8_t* page, CodeScratch& codes) {
  const KvsCodec& c = t.chain.stage[stage];
  const int rank = rank_of(c), dim = t.head_dim;
  const std::unique_ptr<LowRankScratch> s(new LowRankScratch);
  std::copy_n(rows, t.elements(), s->error);
  encode_stage(t, stage + 1, rows, page, codes);
  decode_stage(t, stage + 1, page, s->panels);
  panels_to_rows(t, s->panels, s->decoded);
  for (int i = 0; i < t.elements(); i += VL) storeu(s->error + i, loadu(s->error + i) - loadu(s->decoded + i));
  std::fill(s->error, s->error + t.first_counted * dim, 0.0f);
  fit_directions(t, rank, *s);
  uint16_t *left = (uint16_t*)(page + left_at(c)), *right = (uint16_t*)(page + right_at(c));
  store_row(right, s->directions, rank * dim, KVS_F16);
  load_row(s->directions, right, rank * dim, KVS_F16);
  project(t, rank, *s);
  for (int i = 0; i < t.tokens * rank; ++i) left[i] = float_to_half_saturated(s->products[i]);
}

// Adds sum over r of rows[r] * columns[r] to panels: `rows` is [matrix row][rank], `columns` [rank][matrix column].
inline void add_product(const HalfTile& t, int rank, const float* rows, const float* columns, float* panels) {
  const int count = t.rows(), width = t.columns();
  for (int column = 0; column < width; column += VL)
    for (int row = 0; row < count; ++row) {
      float* to = panels + ((ptrdiff_t)(column / COLUMNS) * count + row) * COLUMNS + column % COLUMNS;
      VF sum{};
      for (int r = 0; r < rank; ++r) sum += rows[row * rank + r] * loadu(columns + r * width + column);
      storeu(to, loadu(to) + sum);
    }
}

// [rows][columns] float16 to float32, transposed.
inline void load_turned(float* to, const uint16_t* from, int rows, int columns) {
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < columns; ++column) to[column * rows + row] = half_to_float(from[row * columns + column]);
}

inline void decode_low_rank(const HalfTile& t, int stage, const uint8_t* page, float* panels) {
  const KvsCodec& c = t.chain.stage[stage];
  const int rank = rank_of(c), dim = t.head_dim;
  const uint16_t *left = (const uint16_t*)(page + left_at(c)), *right = (const uint16_t*)(page + right_at(c));
  decode_stage(t, stage + 1, page, panels);
  float of_tokens[MAX_TILE * MAX_RANK], of_channels[MAX_RANK * MAX_DIM];
  if (t.keys) {
    load_turned(of_tokens, left, t.tokens, rank);
    load_turned(of_channels, right, rank, dim);
    return add_product(t, rank, of_channels, of_tokens, panels);
  }
  load_row(of_tokens, left, t.tokens * rank, KVS_F16);
  load_row(of_channels, right, rank * dim, KVS_F16);
  add_product(t, rank, of_tokens, of_channels, panels);
}

}  // namespace kvs
