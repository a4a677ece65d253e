// The two halves of kvs_attend: requests with one query row, and requests with several.
#pragma once
#include "kvserve.h"

namespace kvs {

void attend_decode(const KvsLayout&, const KvsBatch&, const KvsArena&, const float* staged, const KvsRows& q,
                   const KvsRows& out, float* lse, const KvsReceived* received, const int32_t* req_ids, int32_t n);
void attend_extend(const KvsLayout&, const KvsBatch&, const KvsArena&, const float* staged, const KvsRows& q,
                   const KvsRows& out, float* lse, const int32_t* req_ids, int32_t n);

}  // namespace kvs
