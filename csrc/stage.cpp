// kvs_stage: new rows as the arena keeps them. kvs_store_tail: the unfinished tile's new tokens.
#include <algorithm>

#include "geometry.h"
#include "rotate.h"
#include "simd.h"

namespace kvs {
namespace {

// Round n float32 values to what the dense dtype can hold, in place.
void round_row(float* x, int n, int32_t dtype) {
  if (dtype == KVS_F32) return;
  for (int i = 0; i < n; i += VL) {
    uint16_t packed[VL];
    store_row(packed, x + i, VL, dtype);
    load_row(x + i, packed, VL, dtype);
  }
}

// Whether a number of the row is none that float16 has room for; NaN is no number.
bool beyond_range(const float* x, int n) {
  VF top{};
  for (int i = 0; i < n; i += VL) top = vmax(vabs(loadu(x + i)), top);
  return hmax(top) > F16_MAX;
}

}  // namespace
}  // namespace kvs

using namespace kvs;

void kvs_stage(const KvsLayout* layout, const KvsRows* key, const KvsRows* value, int32_t num_tokens,
               float* staged, int64_t* beyond) {
  const KvsLayout& l = *layout;
  const bool saturates = l.dense_dtype == KVS_F16 || !all_dense(l);
  int64_t count = 0;
#pragma omp parallel for schedule(static) reduction(+ : count) if (num_tokens > 32)
  for (int32_t t = 0; t < num_tokens; ++t)
    for (int32_t h = 0; h < l.num_kv_heads; ++h) {
      float* k = staged + (int64_t(t) * l.num_kv_heads + h) * 2 * l.head_dim;
      float* v = k + l.head_dim;
      load_row(k, row_at(*key, t, h), l.head_dim, key->dtype);
      load_row(v, row_at(*value, t, h), l.head_dim, value->dtype);
      if (l.value_rotated) hadamard(v, l.head_dim);
      if (saturates) count += beyond_range(k, l.head_dim) + beyond_range(v, l.head_dim);
      round_row(k, 2 * l.head_dim, l.dense_dtype);
    }
  *beyond += count;
}

void kvs_store_tail(const KvsLayout* layout, const KvsBatch* batch, const KvsArena* arena, const float* staged) {
  const KvsLayout& l = *layout;
  if (!l.tile_tokens) return;
#pragma omp parallel for schedule(static) if (batch->num_reqs > 32)
  for (int32_t r = 0; r < batch->num_reqs; ++r) {
    const Request q = request_of(*batch, r);
    const int32_t least = std::max(q.seq_len - l.draft_tokens, 0);  // the length if all drafts are rejected
    const int32_t first = std::max(q.num_computed, least / l.tile_tokens * l.tile_tokens);
    for (int32_t p = first; p < q.seq_len; ++p)
      for (int32_t h = 0; h < l.num_kv_heads; ++h) {
        const float* from = staged_row(l, staged, q.first_row + p - q.num_computed, h);
        store_row(tail_slot(l, *arena, q.row, h, p), from, 2 * l.head_dim, l.dense_dtype);
      }
  }
}
