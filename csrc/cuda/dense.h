// Attention to tokens that are not coded: sinks and the unfinished tile, 16 at a time.
#pragma once
#include "../geometry.h"
#include "softmax.h"
#include "keys.h"

namespace kvs::gpu {

// K and V of one token: in a slot of the arena, or still staged in float32 (rounded as a slot would), or not there.
struct DenseRow {
  const uint32_t* slot;
  const float* staged;
};

// Where the dense tokens of one KV head of one request lie.
struct DenseTokens {
  const KvsLayout& layout;
  const KvsArena& arena;
  const Request& request;
  const float* staged;
  int kv_head;
  int first, end;  // visible tokens
  bool sinks;      // of the sink blocks, else of the tail
};

KVS_LANE DenseRow dense_row(const DenseTokens& tokens, int t) {
  if (t < tokens.first || t >= tokens.end) return {nullptr, nullptr};
  const Request& request = tokens.request;
  if (!tokens.sinks && t >= request.num_computed) {
    const int64_t row = request.first_row + t - request.num_computed;
    return {nullptr, staged_row(tokens.layout, tokens.staged, row, tokens.kv_head)};
  }
  const uint8_t* slot = tokens.sinks ? sink_slot(tokens.layout, tokens.arena, request.row, tokens.kv_head, t)
                                     : tail_slot(tokens.layout, tokens.arena, request.row, tokens.kv_head, t);
  return {reinterpret_cast<const uint32_t*>(slot), nullptr};
}

// Elements i and i + 1 of a row (K, then V), zero where there is none; i is even.
template <class Number>
KVS_LANE uint32_t row_pair(DenseRow row, int i) {
  if (row.slot) return row.slot[i / 2];
  return row.staged ? Number::pack(row.staged[i], row.staged[i + 1]) : 0u;
}

// The low (high) halves of two words.
KVS_LANE uint32_t low_halves(uint32_t x, uint32_t y) { return permute(x, y, 0x5410); }
KVS_LANE uint32_t high_halves(uint32_t x, uint32_t y) { return permute(x, y, 0x7632); }

// Scores of the tokens [start, start + 16), times `scale`, -infinity where hidden.
template <class Number, int DIM>
KVS_LANE void dense_scores(float (&scores)[4], const Query& query, const DenseTokens& tokens, int start,
                           float scale, int lane) {
  const int g = lane / 4, t = lane % 4;
  const DenseRow rows[2] = {dense_row(tokens, start + 2 * g), dense_row(tokens, start + 2 * g + 1)};
  float products[4] = {};
#pragma unroll
  for (int s = 0; s < DIM / TILE; ++s) {
    const int channel = TILE * s + 4 * t;
    uint32_t a[4];
    for (int j = 0; j < 2; ++j) {
      const uint32_t first = row_pair<Number>(rows[j], channel), second = row_pair<Number>(rows[j], channel + 2);
      a[j] = low_halves(first, second);
      a[j + 2] = high_halves(first, second);
    }
    const Words x = query_fragment(query, s, t);
    const uint32_t b[2] = {x.first, x.second};
    Number::mma(products, a, b);
  }
  for (int i = 0; i < 4; ++i) {
    const int token = start + 2 * g + i / 2;
    scores[i] = token >= tokens.first && token < tokens.end ? products[i] * scale : NOTHING;
  }
}

template <class Number, int DIM>
KVS_LANE void add_dense_values(State<DIM>& state, const float (&weights)[4], const DenseTokens& tokens, int start,
                               int lane) {
  const int g = lane / 4, t = lane % 4;
  DenseRow rows[4];
  for (int j = 0; j < 4; ++j) rows[j] = dense_row(tokens, start + 4 * t + j);
  uint32_t b[2];
  pack_weights<Number>(b, weights);
#pragma unroll
  for (int m = 0; m < DIM / TILE; ++m) {
    uint32_t x[4];
    for (int j = 0; j < 4; ++j) x[j] = row_pair<Number>(rows[j], DIM + TILE * m + 2 * g);
    const uint32_t a[4] = {low_halves(x[0], x[2]), high_halves(x[0], x[2]), low_halves(x[1], x[3]),
                           high_halves(x[1], x[3])};
    Number::mma(state.output[m], a, b);
  }
}

// Attends to 16 dense tokens from `start` on.
template <class Number, int DIM>
KVS_LANE void add_dense_tile(State<DIM>& state, const Query& query, const DenseTokens& tokens, int start,
                             float scale, int lane) {
  float scores[1][4];
  dense_scores<Number, DIM>(scores[0], query, tokens, start, scale, lane);
  take_scores(state, scores);
  add_dense_values<Number>(state, scores[0], tokens, start, lane);
}

}  // namespace kvs::gpu
