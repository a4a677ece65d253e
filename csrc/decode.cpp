// Attention of requests with few query rows: (request, kv_head, chunk) tasks, merged by log-sum-exp.
//
// The rows of a request count as more heads of its group: whatever was there before the step is seen by all of them, so
// that it is read once. Only among the step's own tokens each row has an end of its own.
#include <algorithm>
#include <memory>
#include <vector>

#include "attend.h"
#include "attend_pages.h"
#include "dense.h"
#include "geometry.h"
#include "received.h"
#include "rotate.h"

namespace kvs {
namespace {

constexpr int CHUNK_TILES = 32;
constexpr int CHUNK_TOKENS_DENSE = 2048;

constexpr int32_t NOT_KEPT = -1;
static_assert(MAX_FEW_ROWS <= DENSE_TOKENS, "a row attends to the step's own tokens at once");

// Tokens [first, last) of one request and KV head. `index` of `chunks` partial results.
struct Task {
  Request request;  // or the part of it whose queries are in one tile
  int32_t id;  // of the request in its batch
  int32_t kv_head, first, last, index, chunks;
  int32_t kept;  // else the first page of one of the head's runs, and first and last count the run's tokens
  int32_t column;  // of its first token, among all that the KV head holds
  const KvsLayout* layout;  // of the pages it reads
  Trace trace{};   // an evicted request's sinks belong to one task, and stand behind its tokens there
  int64_t partial = 0;  // where its result begins

  int32_t num_tokens() const { return last - first; }
  int32_t rows() const { return request.seq_len - request.num_computed; }
};

// `count` rows of heads that see the same tokens.
struct Queries {
  Heads heads;
  int count;
};

struct Scratch {
  PageScratch page;
  SlotQueue slots;
  std::vector<float> q;
};

class Decode {
 public:
  Decode(const KvsLayout& l, const KvsBatch& b, const KvsArena& a, const float* staged, const KvsRows& q,
         const KvsRows& out, float* lse, const KvsReceived* received)
      : l(l), b(b), a(a), staged(staged), q(q), out(out), lse(lse), received(received),
        group(l.num_heads / l.num_kv_heads) {}

  void run(const int32_t* req_ids, int32_t n) {
    plan(req_ids, n);
#pragma omp parallel if (tasks.size() > 1)
    {
      Scratch scratch;
      scratch.q.resize(size_t(most_queries) * l.head_dim);
      if (!all_dense(l)) reserve_panels(scratch.page);
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < tasks.size(); ++i) {
        attend(tasks[i], scratch);
        if (tasks[i].chunks == 1) finish(i);
      }
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < tasks.size(); ++i)
        if (tasks[i].chunks > 1 && tasks[i].index == 0) finish(i);
    }
  }

 private:
  const KvsLayout& l;
  const KvsBatch& b;
  const KvsArena& a;
  const float* staged;
  const KvsRows &q, &out;
  float* lse;
  const KvsReceived* received;
  const int group;
  int most_queries = 0;  // of a task
  std::vector<Task> tasks;  // the chunks of one (request, kv_head) are adjacent
  std::unique_ptr<float[]> partials;
  std::vector<float> traces;

  // Panels of the halves that are not read in integers.
  void reserve_panels(PageScratch& s) const {
    const bool each_page = most_queries > MAX_HEADS;
    for (int32_t format = 0; format < l.num_formats; ++format) {
      const KvsLayout& of_format = layout_of(l, format);
      if (!is_affine_by_channel(of_format.key)) s.keys.reserve(panel_floats(key_tile(l, 0, 0)), each_page);
      if (!is_affine_by_token(of_format.value)) s.values.reserve(panel_floats(value_tile(l, 0, 0)), each_page);
    }
  }

  int queries_of(const Task& t) const { return group * t.rows(); }
  // Result of a task: max [queries], sum [queries], out [queries][head_dim].
  Queries queries_of(const Task& t, const float* query) const {
    const int count = queries_of(t);
    float* partial = partials.get() + t.partial;
    return {{query, partial + 2 * count, partial, partial + count, l.head_dim, l.soft_cap}, count};
  }

  void plan(const int32_t* req_ids, int32_t n) {
    for (int32_t i = 0; i < n; ++i) {
      const Request r = request_of(b, req_ids[i]);
      for (int32_t begin = r.num_computed; begin < r.seq_len;) {
        Request part = r;
        part.num_computed = begin;
        part.first_row += begin - r.num_computed;
        if (l.tile_tokens) part.seq_len = std::min(r.seq_len, (begin / l.tile_tokens + 1) * l.tile_tokens);
        plan_part(part, req_ids[i]);
        begin = part.seq_len;
      }
    }
    int64_t total = 0;
    for (Task& t : tasks) {
      t.partial = total;
      total += int64_t(queries_of(t)) * (l.head_dim + 2);
      most_queries = std::max(most_queries, queries_of(t));
    }
    partials.reset(new float[total]);
    if (received) reserve_traces();
  }

  void plan_part(const Request& r, int32_t id) {
    const int32_t size = all_dense(l) ? CHUNK_TOKENS_DENSE : CHUNK_TILES * l.tile_tokens;
    const int32_t first = l.sliding_window ? std::max(0, r.seq_len - l.sliding_window) : r.kept_end;
    for (int32_t h = 0; h < l.num_kv_heads; ++h) {
      const KvsKept kept = r.kept_end ? kept_of(a, r.row, h) : KvsKept{};
      int32_t done = 0, column = r.kept_end ? l.sink_tokens : 0;
      for (int32_t run = 0; run < kept.num_runs; ++run) done += (kept.runs[run].num_tokens + size - 1) / size;
      const int32_t chunks = done + (r.seq_len - 1) / size - first / size + 1;
      int32_t c = 0;
      for (int32_t run = 0; run < kept.num_runs; column += kept.runs[run++].num_tokens) {
        const auto [format, page, count] = kept.runs[run];
        for (int32_t t = 0; t < count; t += size)
          tasks.push_back({r, id, h, t, std::min(count, t + size), c++, chunks, page, column + t,
                           &layout_of(l, format)});
      }
      for (int32_t start = first / size * size; c < chunks; start += size) {
        const int32_t t = std::max(first, start);
        tasks.push_back({r, id, h, t, std::min(r.seq_len, start + size), c++, chunks, NOT_KEPT,
                         column - r.kept_end + t, &l});
      }
    }
  }

  void reserve_traces() {
    int64_t total = 0;
    for (Task& t : tasks) {
      if (!received->sums[t.id]) continue;
      t.trace.width = t.num_tokens() + (has_kept_sinks(t) ? l.sink_tokens : 0);
      total += int64_t(group) * t.trace.width;
    }
    traces.assign(total, 0.0f);
    float* next = traces.data();
    for (Task& t : tasks) {
      if (!received->sums[t.id]) continue;
      t.trace.weights = next;
      next += int64_t(group) * t.trace.width;
    }
  }

  // Whether the task has the sinks of an evicted request.
  bool has_kept_sinks(const Task& t) const {
    return t.request.kept_end && t.kept == NOT_KEPT && t.first == t.request.kept_end;
  }
  int32_t place_of_sink(const Task& t, int32_t p) const { return t.request.kept_end ? t.num_tokens() + p : p - t.first; }

  void attend(const Task& t, Scratch& s) const {
    const Queries q = queries_of(t, s.q.data());
    load_queries(t, s.q.data());
    std::fill_n(q.heads.max, q.count, NEG_INF);
    std::fill_n(q.heads.sum, q.count, 0.0f);
    std::fill_n(q.heads.out, int64_t(q.count) * l.head_dim, 0.0f);
    if (l.sink_logits && t.index == 0) {  // in one chunk of them all
      for (int i = 0; i < q.count; i += group) std::copy_n(l.sink_logits + t.kv_head * group, group, q.heads.max + i);
      std::fill_n(q.heads.sum, q.count, 1.0f);
    }
    if (all_dense(l)) return attend_dense_slots(t, q, s);
    if (t.kept != NOT_KEPT) return attend_kept(t, q, s);
    attend_sealed(t, q, s);
    attend_own(t, q, s);
  }

  void attend_dense_slots(const Task& t, const Queries& q, Scratch& s) const {
    const Request& r = t.request;
    if (t.kept != NOT_KEPT) {
      for (int32_t i = t.first; i < t.last; ++i) push(t, kept_slot(l, a, r, t.kept, i), i - t.first, q, s);
      return flush(t, q, s);
    }
    if (has_kept_sinks(t))
      for (int32_t p = 0; p < l.sink_tokens; ++p)
        push(t, sink_slot(l, a, r.row, t.kv_head, p), place_of_sink(t, p), q, s);
    const int32_t stored = l.tile_tokens ? r.num_computed : r.seq_len;  // the dense policy has the query's own token too
    for (int32_t p = t.first; p < std::min(t.last, stored); ++p)
      push(t, stored_slot(l, a, r, t.kv_head, p), p - t.first, q, s);
    flush(t, q, s);
    if (l.tile_tokens) attend_own(t, q, s);
  }

  void attend_sealed(const Task& t, const Queries& q, Scratch& s) const {
    const int32_t stored = t.request.num_computed, size = l.tile_tokens, tile_start = stored / size * size;
    const int32_t* row = t.request.row;
    const int32_t shown = std::max(t.first, l.sink_tokens);  // the first token that is read from a page
    const int32_t tile = shown / size, tiles_end = (std::min(t.last, tile_start) + size - 1) / size;
    prefetch_pages(t, tile, tiles_end);
    const int32_t sinks = t.first == t.request.kept_end ? 0 : t.first;  // of an evicted request: in its first chunk
    const int32_t sinks_end = std::min({t.last, l.sink_tokens, tile_start});
    for (int32_t p = sinks; p < sinks_end; ++p)
      push(t, sink_slot(l, a, row, t.kv_head, p), place_of_sink(t, p), q, s);
    for (int32_t p = std::max(t.first, tile_start); p < std::min(t.last, stored); ++p)
      push(t, tail_slot(l, a, row, t.kv_head, p), p - t.first, q, s);
    flush(t, q, s);
    for (int32_t i = tile; i < tiles_end; i += MAX_PAGES)
      attend_batch(t, i, tiles_end, std::max(shown - i * size, 0), q, s);
  }

  void attend_kept(const Task& t, const Queries& q, Scratch& s) const {
    const int32_t size = l.tile_tokens, first = t.first / size, end = (t.last + size - 1) / size;
    prefetch_pages(t, first, end);
    for (int32_t i = first; i < end; i += MAX_PAGES) attend_batch(t, i, end, 0, q, s);
  }

  // MAX_PAGES pages from `first` on, without the first `hidden` tokens.
  void attend_batch(const Task& t, int32_t first, int32_t pages_end, int hidden, const Queries& q, Scratch& s) const {
    Pages pages;
    pages.page_bytes = t.layout->page_bytes;
    pages.kv_head = t.kv_head;
    pages.first_position = t.kept == NOT_KEPT ? first * l.tile_tokens : ANYWHERE;
    s.page.keys.done = s.page.values.done = false;
    for (int32_t i = first; i < std::min(first + MAX_PAGES, pages_end); ++i) {
      const int32_t after = i + MAX_PAGES;
      pages.pages[pages.count] = page_of(t, i);
      pages.next[pages.count++] = after < pages_end ? page_of(t, after) : nullptr;
    }
    const int last = std::min(pages.count * l.tile_tokens, t.last - first * l.tile_tokens);
    in_parts(t, q, s, last, first * l.tile_tokens - t.first, nullptr, [&](const Heads& part, int count) {
      attend_pages(*t.layout, pages, part, count, hidden, last, s.page);
    });
  }

  // Tile i, of the sequence or of the task's run.
  const uint8_t* page_of(const Task& t, int32_t i) const {
    return t.kept == NOT_KEPT ? tile_page(l, a, t.request, t.kv_head, i)
                              : kept_tile(*t.layout, a, t.request.kept_blocks, t.kept, i);
  }
  void prefetch_pages(const Task& t, int32_t first, int32_t end) const {
    for (int32_t i = first; i < std::min(first + MAX_PAGES, end); ++i) prefetch(page_of(t, i), t.layout->page_bytes);
  }

  // The step's own tokens, which are not stored yet: each row sees those up to its own.
  void attend_own(const Task& t, const Queries& q, Scratch& s) const {
    const int32_t first = std::max(t.first, t.request.num_computed);
    const uint8_t* keys[MAX_FEW_ROWS];
    int32_t places[MAX_FEW_ROWS];
    for (int32_t p = first; p < t.last; ++p) {
      const int64_t token = t.request.first_row + p - t.request.num_computed;
      keys[p - first] = (const uint8_t*)staged_row(l, staged, token, t.kv_head);
      places[p - first] = p - t.first;
    }
    for (int row = 0; row < t.rows(); ++row) {
      const int32_t end = std::min(t.last, t.request.num_computed + row + 1);
      if (end <= first) continue;
      const Queries own{heads_from(q.heads, row * group), group};
      attend_all(t, {keys, end - first, int64_t(l.head_dim) * 4}, places, KVS_F32, own, s);
    }
  }

  void push(const Task& t, const uint8_t* slot, int32_t place, const Queries& q, Scratch& s) const {
    s.slots.push(slot, slot_bytes(l), place);
    if (s.slots.full()) attend_slots(t, DENSE_TOKENS, q, s);
  }
  void flush(const Task& t, const Queries& q, Scratch& s) const {
    while (s.slots.count) attend_slots(t, std::min(DENSE_TOKENS, s.slots.count), q, s);
  }
  void attend_slots(const Task& t, int count, const Queries& q, Scratch& s) const {
    attend_all(t, {s.slots.slots, count, slot_bytes(l) / 2}, s.slots.places, l.dense_dtype, q, s);
    s.slots.pop(count);
  }
  void attend_all(const Task& t, const DenseRows& rows, const int32_t* places, int32_t dtype, const Queries& q,
                  Scratch& s) const {
    in_parts(t, q, s, rows.count, 0, places,
             [&](const Heads& part, int count) { attend_dense(rows, dtype, part, count, s.page.scores); });
  }

  // Runs `attend` for up to MAX_HEADS heads at a time; it leaves the weights of `n` tokens in s.page.scores. Their places
  // in the task's trace: as of Trace::take.
  template <typename Attend>
  void in_parts(const Task& t, const Queries& q, Scratch& s, int n, int32_t place, const int32_t* places,
                const Attend& attend) const {
    for (int h = 0; h < q.count; h += MAX_HEADS) {
      const Heads part = heads_from(q.heads, h);
      const int count = std::min(MAX_HEADS, q.count - h);
      float before[MAX_HEADS];
      std::copy_n(part.max, count, before);
      attend(part, count);
      if (t.trace.weights) t.trace.take(part, h, count, before, s.page.scores, n, place, places);
    }
  }

  void load_queries(const Task& t, float* to) const {
    for (int h = 0; h < queries_of(t); ++h) {
      float* row = to + h * l.head_dim;
      load_row(row, row_at(q, t.request.first_row + h / group, t.kv_head * group + h % group), l.head_dim, q.dtype);
      for (int i = 0; i < l.head_dim; i += VL) storeu(row + i, loadu(row + i) * l.scale);
    }
  }

  // The result of one chunk += that of another of the same queries.
  void merge(const Task& one, const Task& other) const {
    const Heads to = queries_of(one, nullptr).heads, from = queries_of(other, nullptr).heads;
    for (int h = 0; h < queries_of(one); ++h) {
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

  // Merges the chunks of tasks[i], the first of them, and writes the result.
  void finish(size_t i) const {
    const Task& t = tasks[i];
    const auto [heads, count] = queries_of(t, nullptr);
    std::vector<float> own_max(heads.max, heads.max + count);  // merging changes it
    for (int c = 1; c < t.chunks; ++c) merge(t, tasks[i + c]);
    if (t.trace.weights) add_received(i, heads, own_max);
    for (int h = 0; h < count; ++h) {
      const int32_t head = t.kv_head * group + h % group;
      const int64_t token = t.request.first_row + h / group;
      float* o = heads.out + h * l.head_dim;
      for (int i = 0; i < l.head_dim; i += VL) storeu(o + i, loadu(o + i) / heads.sum[h]);
      if (l.value_rotated) hadamard(o, l.head_dim);
      store_row(row_at(out, token, head), o, l.head_dim, out.dtype);
      if (lse) lse[token * l.num_heads + head] = heads.max[h] + std::log(heads.sum[h]);
    }
  }

  void add_received(size_t i, const Heads& merged, const std::vector<float>& first_max) const {
    const Task& t = tasks[i];
    std::vector<float> denominator(group);
    for (int h = 0; h < group; ++h) denominator[h] = merged.max[h] + std::log(merged.sum[h]);
    float* sums = received->sums[t.id] + t.kv_head * received->columns[t.id];
    for (int c = 0; c < t.chunks; ++c) {
      const Task& chunk = tasks[i + c];
      const float* max = c ? queries_of(chunk, nullptr).heads.max : first_max.data();
      const int32_t n = chunk.num_tokens(), sinks = chunk.trace.width - n;
      chunk.trace.add_to(sums + chunk.column, 0, n, group, max, denominator.data(), received->power);
      chunk.trace.add_to(sums, n, sinks, group, max, denominator.data(), received->power);
    }
  }
};

}  // namespace

void attend_decode(const KvsLayout& l, const KvsBatch& b, const KvsArena& a, const float* staged, const KvsRows& q,
                   const KvsRows& out, float* lse, const KvsReceived* received, const int32_t* req_ids, int32_t n) {
  Decode(l, b, a, staged, q, out, lse, received).run(req_ids, n);
}

}  // namespace kvs
