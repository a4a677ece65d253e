// Attention of requests with one query row: (request, kv_head, chunk) tasks, merged by log-sum-exp.
#include <algorithm>
#include <memory>
#include <vector>

#include "attend.h"
#include "dense.h"
#include "geometry.h"
#include "rotate.h"
#include "sealed.h"

namespace kvs {
namespace {

constexpr int CHUNK_TILES = 32;
constexpr int CHUNK_TOKENS_DENSE = 2048;

constexpr int32_t NOT_KEPT = -1;

// Tokens [first, last) of one request and KV head. `index` of `chunks` partial results.
struct Task {
  Request request;
  int32_t kv_head, first, last, index, chunks;
  int32_t kept;  // else the head's first kept page, and first and last count its kept tokens
};

struct Scratch {
  PageScratch page;
  SlotQueue slots;
  std::vector<float> q;
};

class Decode {
 public:
  Decode(const KvsLayout& l, const KvsBatch& b, const KvsArena& a, const float* staged, const KvsRows& q,
         const KvsRows& out, float* lse)
      : l(l), b(b), a(a), staged(staged), q(q), out(out), lse(lse), group(l.num_heads / l.num_kv_heads) {}

  void run(const int32_t* req_ids, int32_t n) {
    plan(req_ids, n);
    const int64_t partial = int64_t(group) * (l.head_dim + 2);
    partials.reset(new float[partial * tasks.size()]);
#pragma omp parallel if (tasks.size() > 1)
    {
      Scratch scratch;
      scratch.q.resize(size_t(group) * l.head_dim);
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < tasks.size(); ++i) {
        attend(tasks[i], partial_of(i), scratch);
        if (tasks[i].chunks == 1) finish(tasks[i], partial_of(i));
      }
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < tasks.size(); ++i)
        if (tasks[i].chunks > 1 && tasks[i].index == 0) {
          for (int c = 1; c < tasks[i].chunks; ++c) merge(partial_of(i), partial_of(i + c));
          finish(tasks[i], partial_of(i));
        }
    }
  }

 private:
  const KvsLayout& l;
  const KvsBatch& b;
  const KvsArena& a;
  const float* staged;
  const KvsRows &q, &out;
  float* lse;
  const int group;
  std::vector<Task> tasks;  // the chunks of one (request, kv_head) are adjacent
  std::unique_ptr<float[]> partials;

  // Partial result of a task: max [group], sum [group], out [group][head_dim].
  float* partial_of(size_t task) const { return partials.get() + task * group * (l.head_dim + 2); }
  Heads heads_of(const float* query, float* partial) const {
    return {query, partial + 2 * group, partial, partial + group, l.head_dim};
  }

  void plan(const int32_t* req_ids, int32_t n) {
    const int32_t size = all_dense(l) ? CHUNK_TOKENS_DENSE : CHUNK_TILES * l.tile_tokens;
    for (int32_t i = 0; i < n; ++i) {
      const Request r = request_of(b, req_ids[i]);
      const int32_t first = l.sliding_window ? std::max(0, r.seq_len - l.sliding_window) : r.kept_end;
      for (int32_t h = 0; h < l.num_kv_heads; ++h) {
        const KvsKept kept = r.kept_end ? kept_of(a, r.row, h) : KvsKept{};
        const int32_t done = (kept.num_tokens + size - 1) / size;
        const int32_t chunks = done + (r.seq_len - 1) / size - first / size + 1;
        for (int32_t c = 0; c < done; ++c)
          tasks.push_back({r, h, c * size, std::min(kept.num_tokens, (c + 1) * size), c, chunks, kept.first_page});
        for (int32_t c = done, start = first / size * size; c < chunks; ++c, start += size)
          tasks.push_back({r, h, std::max(first, start), std::min(r.seq_len, start + size), c, chunks, NOT_KEPT});
      }
    }
  }

  void attend(const Task& t, float* partial, Scratch& s) const {
    load_queries(t, s.q.data());
    std::fill(partial, partial + group, NEG_INF);
    std::fill(partial + group, partial + int64_t(group) * (l.head_dim + 2), 0.0f);
    const Heads heads = heads_of(s.q.data(), partial);
    if (all_dense(l)) return attend_dense_slots(t, heads, s);
    if (t.kept != NOT_KEPT) return attend_kept(t, heads, s);
    attend_sealed(t, heads, s);
    attend_own(t, heads, s);
  }

  void attend_dense_slots(const Task& t, const Heads& heads, Scratch& s) const {
    const Request& r = t.request;
    if (t.kept != NOT_KEPT) {
      for (int32_t i = t.first; i < t.last; ++i) push(kept_slot(l, a, r, t.kept, i), heads, s);
      return flush(heads, s);
    }
    if (r.kept_end && t.first == r.kept_end)
      for (int32_t p = 0; p < l.sink_tokens; ++p) push(sink_slot(l, a, r.row, t.kv_head, p), heads, s);
    const int32_t stored = l.tile_tokens ? r.num_computed : r.seq_len;  // the dense policy has the query's own token too
    for (int32_t p = t.first; p < std::min(t.last, stored); ++p) push(stored_slot(l, a, r, t.kv_head, p), heads, s);
    flush(heads, s);
    if (l.tile_tokens) attend_own(t, heads, s);
  }

  void attend_sealed(const Task& t, const Heads& heads, Scratch& s) const {
    const int32_t position = t.request.seq_len - 1, size = l.tile_tokens, tile_start = position / size * size;
    const int32_t* row = t.request.row;
    const int32_t shown = std::max(t.first, l.sink_tokens);  // the first token that is read from a page
    const int32_t tile = shown / size, tiles_end = (std::min(t.last, tile_start) + size - 1) / size;
    prefetch_pages(t, tile, tiles_end);
    const int32_t sinks = t.first == t.request.kept_end ? 0 : t.first;  // of an evicted request: in its first chunk
    const int32_t sinks_end = std::min({t.last, l.sink_tokens, tile_start});
    for (int32_t p = sinks; p < sinks_end; ++p) push(sink_slot(l, a, row, t.kv_head, p), heads, s);
    for (int32_t p = std::max(t.first, tile_start); p < std::min(t.last, position); ++p)
      push(tail_slot(l, a, row, t.kv_head, p), heads, s);
    flush(heads, s);
    for (int32_t i = tile; i < tiles_end; i += MAX_PAGES)
      attend_batch(t, i, tiles_end, std::max(shown - i * size, 0), heads, s);
  }

  void attend_kept(const Task& t, const Heads& heads, Scratch& s) const {
    const int32_t size = l.tile_tokens, first = t.first / size, end = (t.last + size - 1) / size;
    prefetch_pages(t, first, end);
    for (int32_t i = first; i < end; i += MAX_PAGES) attend_batch(t, i, end, 0, heads, s);
  }

  // MAX_PAGES pages from `first` on, without the first `hidden` tokens.
  void attend_batch(const Task& t, int32_t first, int32_t pages_end, int hidden, const Heads& heads, Scratch& s) const {
    Pages pages;
    pages.page_bytes = l.page_bytes;
    for (int32_t i = first; i < std::min(first + MAX_PAGES, pages_end); ++i) {
      const int32_t after = i + MAX_PAGES;
      pages.pages[pages.count] = page_of(t, i);
      pages.next[pages.count++] = after < pages_end ? page_of(t, after) : nullptr;
    }
    const int last = std::min(pages.count * l.tile_tokens, t.last - first * l.tile_tokens);
    for (int h = 0; h < group; h += MAX_HEADS)
      attend_pages(l, pages, heads_from(heads, h), std::min(MAX_HEADS, group - h), hidden, last, s.page);
  }

  // Tile i, or the i-th page that the KV head keeps.
  const uint8_t* page_of(const Task& t, int32_t i) const {
    return t.kept == NOT_KEPT ? tile_page(l, a, t.request, t.kv_head, i)
                              : kept_page(l, a, t.request.kept_blocks, t.kept + i);
  }
  void prefetch_pages(const Task& t, int32_t first, int32_t end) const {
    for (int32_t i = first; i < std::min(first + MAX_PAGES, end); ++i) prefetch(page_of(t, i), l.page_bytes);
  }

  // The query's own token, which is not stored yet.
  void attend_own(const Task& t, const Heads& heads, Scratch& s) const {
    if (t.last < t.request.seq_len) return;
    const uint8_t* key = (const uint8_t*)staged_row(l, staged, t.request.first_row, t.kv_head);
    attend_all({&key, 1, int64_t(l.head_dim) * 4}, KVS_F32, heads, s);
  }

  void push(const uint8_t* slot, const Heads& heads, Scratch& s) const {
    s.slots.push(slot, slot_bytes(l));
    if (s.slots.full()) attend_slots(DENSE_TOKENS, heads, s);
  }
  void flush(const Heads& heads, Scratch& s) const {
    while (s.slots.count) attend_slots(std::min(DENSE_TOKENS, s.slots.count), heads, s);
  }
  void attend_slots(int count, const Heads& heads, Scratch& s) const {
    attend_all({s.slots.slots, count, slot_bytes(l) / 2}, l.dense_dtype, heads, s);
    s.slots.pop(count);
  }
  void attend_all(const DenseRows& rows, int32_t dtype, const Heads& heads, Scratch& s) const {
    for (int h = 0; h < group; h += MAX_HEADS)
      attend_dense(rows, dtype, heads_from(heads, h), std::min(MAX_HEADS, group - h), s.page.scores);
  }

  void load_queries(const Task& t, float* to) const {
    for (int h = 0; h < group; ++h) {
      float* row = to + h * l.head_dim;
      load_row(row, row_at(q, t.request.first_row, t.kv_head * group + h), l.head_dim, q.dtype);
      for (int i = 0; i < l.head_dim; i += VL) storeu(row + i, loadu(row + i) * l.scale);
    }
  }

  // partial += other
  void merge(float* partial, const float* other) const {
    const Heads to = heads_of(nullptr, partial), from = heads_of(nullptr, const_cast<float*>(other));
    for (int h = 0; h < group; ++h) {
      const float top = std::max(to.max[h], from.max[h]);
      if (top == NEG_INF) continue;
      const float keep = std::exp(to.max[h] - top), add = std::exp(from.max[h] - top);
      to.max[h] = top;
      to.sum[h] = to.sum[h] * keep + from.sum[h] * add;
      float* o = to.out + h * l.head_dim;
      const float* more = from.out + h * l.head_dim;
      for (int i = 0; i < l.head_dim; i += VL) storeu(o + i, loadu(o + i) * keep + loadu(more + i) * add);
    }
  }

  void finish(const Task& t, float* partial) const {
    const Heads heads = heads_of(nullptr, partial);
    for (int h = 0; h < group; ++h) {
      const int32_t head = t.kv_head * group + h;
      float* o = heads.out + h * l.head_dim;
      for (int i = 0; i < l.head_dim; i += VL) storeu(o + i, loadu(o + i) / heads.sum[h]);
      if (l.value_rotated) hadamard(o, l.head_dim);
      store_row(row_at(out, t.request.first_row, head), o, l.head_dim, out.dtype);
      if (lse) lse[int64_t(t.request.first_row) * l.num_heads + head] = heads.max[h] + std::log(heads.sum[h]);
    }
  }
};

}  // namespace

void attend_decode(const KvsLayout& l, const KvsBatch& b, const KvsArena& a, const float* staged, const KvsRows& q,
                   const KvsRows& out, float* lse, const int32_t* req_ids, int32_t n) {
  Decode(l, b, a, staged, q, out, lse).run(req_ids, n);
}

}  // namespace kvs
