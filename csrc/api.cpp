// Dispatch of kvs_attend, and what the library says about itself.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "attend.h"
#include "simd.h"

namespace {

// Query rows of a request that are attended to as one row is. A step that checks drafts has few, and they are worth it;
// the rows of a prompt are not, and how it is divided into chunks shall not show in its numbers.
int32_t few_rows(const KvsLayout& l) {
  if (!l.tile_tokens || l.sliding_window) return 1;
  return std::min(1 + l.draft_tokens, kvs::MAX_FEW_ROWS);
}

}  // namespace

void kvs_attend(const KvsLayout* layout, const KvsBatch* batch, const KvsArena* arena, const float* staged,
                const KvsRows* query, const KvsRows* out, float* lse, const KvsReceived* received) {
  std::vector<int32_t> decode, extend;
  const int32_t few = few_rows(*layout);
  for (int32_t r = 0; r < batch->num_reqs; ++r) {
    const int32_t query_len = batch->query_start_loc[r + 1] - batch->query_start_loc[r];
    if (query_len > 0) (query_len <= few ? decode : extend).push_back(r);
  }
  if (!decode.empty())
    kvs::attend_decode(*layout, *batch, *arena, staged, *query, *out, lse, received, decode.data(),
                       int32_t(decode.size()));
  if (!extend.empty())
    kvs::attend_extend(*layout, *batch, *arena, staged, *query, *out, lse, extend.data(), int32_t(extend.size()));
}

void kvs_forward(const KvsLayout* layout, const KvsBatch* batch, const KvsArena* arena, const KvsRows* key,
                 const KvsRows* value, int32_t num_tokens, float* staged, int64_t* beyond, const KvsRows* query,
                 const KvsRows* out, float* lse, const KvsReceived* received) {
  kvs_stage(layout, key, value, num_tokens, staged, beyond);
  kvs_store_sealed(layout, batch, arena, staged);
  kvs_attend(layout, batch, arena, staged, query, out, lse, received);
  kvs_store_tail(layout, batch, arena, staged);
}

const char* kvs_isa(void) { return KVS_ISA; }

int64_t kvs_layout_bytes(void) { return sizeof(KvsLayout); }

int32_t kvs_num_threads(void) { return omp_get_max_threads(); }
