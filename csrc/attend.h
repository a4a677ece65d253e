// The two halves of kvs_attend: requests with few query rows, and requests with many.
#pragma once
#include "kvserve.h"

namespace kvs {

constexpr int MAX_FEW_ROWS = 16;  // of a request in attend_decode

void attend_decode(const KvsLayout&, const KvsBatch&, const KvsArena&, const float* staged, const KvsRows& q,
                   const KvsRows& out, float* lse, const KvsReceived* received, const int32_t* req_ids, int32_t n);
void attend_extend(const KvsLayout&, const KvsBatch&, const KvsArena&, const float* staged, const KvsRows& q,
                   const KvsRows& out, float* lse, const int32_t* req_ids, int32_t n);

}  // namespace kvs
