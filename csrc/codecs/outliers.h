// KVS_OUTLIERS: kvserve/codecs/outliers.py, operation for operation.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>

#include "affine.h"

namespace kvs {

// What shares a scale in the innermost codec: `size` tokens of a channel, or as many channels of a token.
struct Grouping {
  bool per_channel;
  int size;
};

inline Grouping grouping_of(const HalfTile& t) {
  const KvsCodec& c = t.chain.stage[t.chain.stages - 1];
  bool per_channel = t.keys;
  if (c.kind == KVS_AFFINE) per_channel = axis_of(c) == BY_CHANNEL;
  if (c.kind == KVS_TABLE) per_channel = !has_token_ranges(c);
  const int all = per_channel ? t.tokens : t.head_dim;
  return {per_channel, c.kind == KVS_AFFINE ? group_of(c, t.head_dim) : all};
}

// The table whose calibrated ranges hold for the rows that `stage` gets; null: the codecs adapt to the tile.
inline const KvsCodec* fixed_table(const HalfTile& t, int stage) {
  for (; stage + 1 < t.chain.stages; ++stage)
    if (t.chain.stage[stage].kind == KVS_BEFORE_ROPE) return nullptr;
  const KvsCodec& c = t.chain.stage[stage];
  return c.kind == KVS_TABLE && !has_token_ranges(c) ? &c : nullptr;
}

// Middle and reach of the elements of a tile, [token][head_dim], and which of them are outliers.
struct OutlierScratch {
  float middle[MAX_TILE * MAX_DIM], reach[MAX_TILE * MAX_DIM];
  uint64_t order[MAX_TILE * MAX_DIM];
  uint8_t is_outlier[MAX_TILE * MAX_DIM];
};

// Mean, and where reach is not null standard deviation, of each group's counted elements that are no outliers.
inline void group_statistics(const HalfTile& t, const float* rows, const OutlierScratch& s, float* middle, float* reach) {
  const Grouping grouping = grouping_of(t);
  const int dim = t.head_dim, lanes = grouping.per_channel ? dim : t.tokens;
  const int step = grouping.per_channel ? dim : 1, lane_step = grouping.per_channel ? 1 : dim;
  const int groups = (grouping.per_channel ? t.tokens : dim) / grouping.size;
  for (int i = 0; i < groups * lanes; ++i) {
    const int first = i / lanes * grouping.size * step + i % lanes * lane_step, last = first + grouping.size * step;
    const auto counts = [&](int at) { return at >= t.first_counted * dim && !s.is_outlier[at]; };
    double sum = 0, squares = 0;
    int count = 0;
    for (int at = first; at < last; at += step)
      if (counts(at)) sum += rows[at], ++count;
    const double mean = sum / std::max(count, 1);
    for (int at = first; reach && at < last; at += step)
      if (counts(at)) squares += (rows[at] - mean) * (rows[at] - mean);
    const float deviation = std::max(float(std::sqrt(squares / std::max(count, 1))), MIN_SCALE);
    for (int at = first; at < last; at += step) {
      middle[at] = float(mean);
      if (reach) reach[at] = deviation;
    }
  }
}

inline void fixed_statistics(const HalfTile& t, const KvsCodec& table, float* middle, float* reach) {
  const float* range = table_of(t, table, 1);
  for (int token = 0; token < t.tokens; ++token, middle += t.head_dim, reach += t.head_dim)
    for (int d = 0; d < t.head_dim; ++d) {
      middle[d] = range[t.head_dim + d];
      reach[d] = std::max(range[d], MIN_SCALE);
    }
}

// Marks the `count` elements farthest from their middle; ties: the lower place. NaN is farthest, tokens that are not
// counted are nearest.
inline void mark_outliers(const HalfTile& t, const float* rows, int count, OutlierScratch& s) {
  const int n = t.elements();
  for (int at = 0; at < n; ++at) {
    const float distance = std::fabs(rows[at] - s.middle[at]) / s.reach[at];
    uint32_t rank = std::isnan(distance) ? 0x7fc00000 : float_to_bits(distance);  // ordered as the distances
    rank = at < t.first_counted * t.head_dim ? 0 : rank + 1;
    s.order[at] = uint64_t(rank) << 32 | uint32_t(n - at);
  }
  std::nth_element(s.order, s.order + count, s.order + n, [](uint64_t x, uint64_t y) { return x > y; });
  std::fill(s.is_outlier, s.is_outlier + n, uint8_t(0));
  for (int i = 0; i < count; ++i) s.is_outlier[n - int(uint32_t(s.order[i]))] = 1;
}

inline void encode_outliers(const HalfTile& t, int stage, float* rows, uint8_t* page, CodeScratch& codes) {
  const KvsCodec& c = t.chain.stage[stage];
  const KvsCodec* table = fixed_table(t, stage);
  const std::unique_ptr<OutlierScratch> s(new OutlierScratch);
  std::fill(s->is_outlier, s->is_outlier + t.elements(), uint8_t(0));
  if (table)
    fixed_statistics(t, *table, s->middle, s->reach);
  else
    group_statistics(t, rows, *s, s->middle, s->reach);
  mark_outliers(t, rows, outliers_of(c), *s);
  if (!table) group_statistics(t, rows, *s, s->middle, nullptr);
  uint16_t *values = (uint16_t*)(page + outlier_values_at(c)), *index = (uint16_t*)(page + outlier_index_at(c));
  for (int at = 0; at < t.elements(); ++at) {
    if (!s->is_outlier[at]) continue;
    *values++ = float_to_half_saturated(rows[at]);
    *index++ = uint16_t(at);
    rows[at] = s->middle[at];
  }
  encode_stage(t, stage + 1, rows, page, codes);
}

inline void decode_outliers(const HalfTile& t, int stage, const uint8_t* page, float* panels) {
  const KvsCodec& c = t.chain.stage[stage];
  decode_stage(t, stage + 1, page, panels);
  const uint16_t *values = (const uint16_t*)(page + outlier_values_at(c));
  const uint16_t *index = (const uint16_t*)(page + outlier_index_at(c));
  const int dim = t.head_dim, last = t.elements() - 1;
  for (int i = 0, token = 0; i < outliers_of(c); ++i) {
    const int at = std::min(int(index[i]), last);  // whatever a damaged page has
    while (at >= (token + 1) * dim) ++token;       // they ascend
    while (at < token * dim) --token;
    panels[t.in_panels(token, at - token * dim)] = half_to_float(values[i]);
  }
}

}  // namespace kvs
