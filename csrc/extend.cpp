// Prefill attention: blocked online softmax over decoded tiles, one task per (request, KV head, run of queries).
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "attend.h"
#include "codecs/codec.h"
#include "gemm.h"
#include "geometry.h"
#include "rotate.h"

namespace kvs {
namespace {

constexpr int TARGET_ROWS = 384;
constexpr int MIN_ROWS = 48;

// Queries [first, first + count) (positions) of one request, for the query heads of one KV head.
struct Task {
  int request, kv_head, first, count;
  int64_t cost;
};

// 64 columns (tokens) ready for the micro-kernels; tokens outside [begin, end) are finite and never visible.
struct Tile {
  const float* keys;    // [head_dim][64]
  const float* values;  // [head_dim / 64][64][64], panels `panel_stride` apart
  ptrdiff_t panel_stride;
  int first;  // position of column 0; 0 for columns that every query sees
  int begin, end;
  const float* mass = nullptr;  // [64], added to the scores (base 2); null: nothing is
};

struct Range {
  int begin, end;
};

// Where the K row and the V row of a token lie, and their dtype.
struct TokenRow {
  const void *key, *value;
  int32_t dtype;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// 64-byte aligned floats that grow and never shrink.
class Buffer {
 public:
  float* reserve(size_t count) {
    if (count > size_) {
      data_.reset();
      data_.reset(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
      if (!data_) throw std::bad_alloc();
      size_ = count;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<float[], Free> data_;
  size_t size_ = 0;
};

int round_up(int x, int step) { return (x + step - 1) / step * step; }

// Rows of one task are (query, head of the group), query major, padded to whole strips.
class Worker {
 public:
  Worker(const KvsLayout& layout, const KvsBatch& batch, const KvsArena& arena, const float* staged, const KvsRows& q,
         const KvsRows& out, float* lse)
      : layout_(layout), batch_(batch), arena_(arena), staged_(staged), q_(q), out_(out), lse_(lse),
        dim_(layout.head_dim), group_(layout.num_heads / layout.num_kv_heads),
        tile_tokens_(layout.tile_tokens ? layout.tile_tokens : COLUMNS) {}

  void run(const Task& task);

 private:
  void carve_scratch(int rows);
  void load_queries();
  void store_outputs();
  void attend_dense(int tile_first, int query_end);
  void attend_sealed(int tile_index);
  void decode(const KvsLayout& layout, const uint8_t* page, int first_position);
  const float* load_masses(const KvsLayout& layout, const uint8_t* page);
  void attend_kept();
  void attend_run(const KvsRun& run);
  template <class RowOf>
  void attend_slots(int count, RowOf find);
  void attend(const Tile& tile, int row_begin, int row_end);
  Range score_strip(const Tile& tile, int row, int row_begin, int row_end);
  Range mask_strip(const Tile& tile, int row, int row_begin, int row_end, Range* visible) const;
  KVS_NOINLINE void cap_strip(float* scores, int first, int last) const;
  KVS_INLINE void softmax_strip(int row, int first_vector, int last_vector);
  template <class RowOf>
  void gather(int begin, int end, int tile_first, RowOf find);
  TokenRow slot_row(const uint8_t* slot) const { return {slot, slot + slot_bytes(layout_) / 2, layout_.dense_dtype}; }
  TokenRow token_row(int position) const;
  void load_sinks(float* keys, float* values, ptrdiff_t panel_stride) const;
  void load_panels(float* to, const void* from, ptrdiff_t panel_stride, int32_t dtype) const;
  int64_t token_of(int row) const;
  int64_t head_of(int row) const { return (int64_t)task_.kv_head * group_ + row % group_; }
  uint8_t* row_of(const KvsRows& rows, int row) const;
  int window_begin(int position) const {
    return layout_.sliding_window ? std::max(0, position - layout_.sliding_window + 1) : 0;
  }

  const KvsLayout& layout_;
  const KvsBatch& batch_;
  const KvsArena& arena_;
  const float* staged_;
  const KvsRows& q_;
  const KvsRows& out_;
  float* lse_;
  const int dim_, group_, tile_tokens_;

  Task task_{};
  int last_ = 0;  // position of the task's last query
  Request request_{};
  int rows_ = 0, padded_ = 0;
  std::vector<int> positions_;
  float *queries_, *sums_, *scores_, *top_, *weight_, *rescale_, *keys_, *values_, *gathered_;
  std::vector<Range> ranges_;
  float masses_[MAX_TILE];
};

void Worker::carve_scratch(int rows) {
  const size_t panel_columns = round_up(dim_, COLUMNS);
  const size_t sizes[] = {(size_t)rows * dim_, (size_t)rows * dim_, (size_t)rows * COLUMNS,
                          (size_t)rows, (size_t)rows * VL, (size_t)rows,
                          (size_t)tile_tokens_ * dim_, (size_t)tile_tokens_ * panel_columns, (size_t)COLUMNS * dim_};
  float** parts[] = {&queries_, &sums_, &scores_, &top_, &weight_, &rescale_, &keys_, &values_, &gathered_};
  size_t total = 0;
  for (size_t size : sizes) total += round_up(size, 16);
  static thread_local Buffer memory;
  float* at = memory.reserve(total);
  for (int i = 0; i < 9; ++i) {
    *parts[i] = at;
    at += round_up(sizes[i], 16);
  }
  positions_.resize(rows);
  ranges_.resize(rows / MR);
}

// load_row without a library call for every short float32 row.
inline void copy_row(float* to, const void* from, int count, int32_t dtype) {
  if (dtype != KVS_F32) return load_row(to, from, count, dtype);
  for (int i = 0; i < count; i += VL) storeu(to + i, loadu((const float*)from + i));
}

// The dense row of a token: staged, or in a slot (dense policy: always its own slot).
TokenRow Worker::token_row(int position) const {
  if (!layout_.tile_tokens || position < request_.num_computed)
    return slot_row(stored_slot(layout_, arena_, request_, task_.kv_head, position));
  const int64_t token = request_.first_row + position - request_.num_computed;
  const float* row = staged_row(layout_, staged_, token, task_.kv_head);
  return {row, row + dim_, KVS_F32};
}

// A value row into panels that lie `panel_stride` apart.
void Worker::load_panels(float* to, const void* from, ptrdiff_t panel_stride, int32_t dtype) const {
  const int64_t bytes = dtype == KVS_F32 ? 4 : 2;
  for (int d = 0; d < dim_; d += COLUMNS, to += panel_stride)
    copy_row(to, (const uint8_t*)from + d * bytes, std::min(COLUMNS, dim_ - d), dtype);
}

// Dense tokens [begin, end), each where find says, into the scratch tile that starts at tile_first; the rest of the tile
// is zero.
template <class RowOf>
void Worker::gather(int begin, int end, int tile_first, RowOf find) {
  if (end - begin < COLUMNS) {
    std::fill_n(gathered_, (size_t)COLUMNS * dim_, 0.0f);
    std::fill_n(values_, (size_t)COLUMNS * round_up(dim_, COLUMNS), 0.0f);
  }
  for (int t = begin; t < end; ++t) {
    const TokenRow row = find(t);
    copy_row(gathered_ + (ptrdiff_t)(t - tile_first) * dim_, row.key, dim_, row.dtype);
    load_panels(values_ + (ptrdiff_t)(t - tile_first) * COLUMNS, row.value, COLUMNS * COLUMNS, row.dtype);
  }
  for (int column = 0; column < COLUMNS; column += VL)
    for (int d = 0; d < dim_; d += VL)
      transpose_block(gathered_ + (ptrdiff_t)column * dim_ + d, dim_, keys_ + (ptrdiff_t)d * COLUMNS + column,
                      COLUMNS);
}

// Sink tokens of tile 0 replace what their page says.
void Worker::load_sinks(float* keys, float* values, ptrdiff_t panel_stride) const {
  float row[256];
  for (int t = 0; t < layout_.sink_tokens; ++t) {
    const uint8_t* slot = sink_slot(layout_, arena_, request_.row, task_.kv_head, t);
    load_row(row, slot, dim_, layout_.dense_dtype);
    for (int d = 0; d < dim_; ++d) keys[(ptrdiff_t)(t / COLUMNS * dim_ + d) * COLUMNS + t % COLUMNS] = row[d];
    load_panels(values + (ptrdiff_t)t * COLUMNS, slot + slot_bytes(layout_) / 2, panel_stride, layout_.dense_dtype);
  }
}

// A page of the layout's format to the scratch panels.
void Worker::decode(const KvsLayout& layout, const uint8_t* page, int first_position) {
  decode_panels(key_tile(layout, task_.kv_head, first_position), page, keys_);
  decode_panels(value_tile(layout, task_.kv_head, first_position), page, values_);
}

// What is added to the scores (base 2) of a kept page's tokens; null: nothing is.
const float* Worker::load_masses(const KvsLayout& layout, const uint8_t* page) {
  if (!layout.mass) return nullptr;
  const float* from = masses_of(layout, page);
  for (int t = 0; t < tile_tokens_; t += VL) storeu(masses_ + t, loadu(from + t) * LOG2E);
  return masses_;
}

// Queries of later tiles over the sealed page of this one.
void Worker::attend_sealed(int tile_index) {
  const int tile_end = (tile_index + 1) * tile_tokens_;
  const int first = std::max(task_.first, tile_end);
  const int window_end = layout_.sliding_window ? tile_end - 1 + layout_.sliding_window : last_ + 1;
  const int end = std::min(last_ + 1, window_end);
  if (first >= end) return;
  const uint8_t* page = tile_page(layout_, arena_, request_, task_.kv_head, tile_index);
  const ptrdiff_t panel_stride = (ptrdiff_t)tile_tokens_ * COLUMNS;
  decode(layout_, page, tile_index * tile_tokens_);
  if (tile_index == 0) load_sinks(keys_, values_, panel_stride);
  for (int part = 0; part < tile_tokens_; part += COLUMNS) {
    const Tile tile{keys_ + (ptrdiff_t)part * dim_, values_ + (ptrdiff_t)part * COLUMNS, panel_stride,
                    tile_index * tile_tokens_ + part, 0, COLUMNS};
    attend(tile, (first - task_.first) * group_, (end - task_.first) * group_);
  }
}

// All queries over `count` dense tokens that each of them sees.
template <class RowOf>
void Worker::attend_slots(int count, RowOf find) {
  for (int first = 0; first < count; first += COLUMNS) {
    const int last = std::min(first + COLUMNS, count);
    gather(first, last, first, find);
    attend({keys_, values_, COLUMNS * COLUMNS, 0, 0, last - first}, 0, rows_);
  }
}

// All queries over what an evicted request has left before kept_end: sinks and kept pages.
void Worker::attend_kept() {
  if (layout_.sink_tokens)
    attend_slots(layout_.sink_tokens, [&](int t) {
      return slot_row(sink_slot(layout_, arena_, request_.row, task_.kv_head, t));
    });
  const KvsKept kept = kept_of(arena_, request_.row, task_.kv_head);
  for (int32_t i = 0; i < kept.num_runs; ++i) attend_run(kept.runs[i]);
}

// All queries over one run of kept pages.
void Worker::attend_run(const KvsRun& run) {
  const KvsLayout& layout = layout_of(layout_, run.format);
  if (all_dense(layout))
    return attend_slots(run.num_tokens, [&](int i) {
      return slot_row(kept_slot(layout, arena_, request_, run.first_page, i));
    });
  const ptrdiff_t panel_stride = (ptrdiff_t)tile_tokens_ * COLUMNS;
  for (int first = 0, i = 0; first < run.num_tokens; first += tile_tokens_, ++i) {
    const uint8_t* page = kept_tile(layout, arena_, request_.kept_blocks, run.first_page, i);
    decode(layout, page, ANYWHERE);
    const float* masses = load_masses(layout, page);
    for (int part = 0; part < std::min(tile_tokens_, run.num_tokens - first); part += COLUMNS) {
      const Tile tile{keys_ + (ptrdiff_t)part * dim_, values_ + (ptrdiff_t)part * COLUMNS, panel_stride, 0, 0,
                      std::min(COLUMNS, run.num_tokens - first - part), masses ? masses + part : nullptr};
      attend(tile, 0, rows_);
    }
  }
}

// Queries [begin, end) (positions) over the dense tokens of the 64 columns from tile_first on.
void Worker::attend_dense(int tile_first, int query_end) {
  const int column_end = tile_first + COLUMNS;
  const int begin = std::max(task_.first, tile_first);
  const int window_end = layout_.sliding_window ? column_end - 1 + layout_.sliding_window : query_end;
  const int end = std::min(query_end, window_end);
  if (begin >= end) return;
  const int first = std::max(tile_first, window_begin(begin)), last = std::min(column_end, end);
  gather(first, last, tile_first, [&](int t) { return token_row(t); });
  const Tile tile{keys_, values_, COLUMNS * COLUMNS, tile_first, first - tile_first, last - tile_first};
  attend(tile, (begin - task_.first) * group_, (end - task_.first) * group_);
}

void Worker::attend(const Tile& tile, int row_begin, int row_end) {
  row_end = row_end == rows_ ? padded_ : row_end;
  const int first = row_begin / MR * MR;
  for (int row = first; row < row_end; row += MR)
    ranges_[row / MR] = score_strip(tile, row, row_begin, row_end);
  for (int d = 0; d < dim_; d += PANEL * VL) {
    const float* panel = tile.values + d / COLUMNS * tile.panel_stride + d % COLUMNS;
    const int vectors = std::min(PANEL, (dim_ - d) / VL);
    for (int row = first; row < row_end; row += MR) {
      const Range range = ranges_[row / MR];
      if (range.begin == range.end) continue;
      strip<true>(scores_ + (ptrdiff_t)row * COLUMNS + range.begin, COLUMNS, panel + range.begin * COLUMNS, COLUMNS,
                  range.end - range.begin, sums_ + (ptrdiff_t)row * dim_ + d, dim_, vectors, rescale_ + row);
    }
  }
}

// Turns scores (base 2) into weights relative to the running maximum; a row that sees nothing keeps its state.
void Worker::softmax_strip(int row, int first, int last) {
  float base[MR], change[2 * VL] = {};
  for (int i = 0; i < MR; ++i) {
    const float* scores = scores_ + (ptrdiff_t)(row + i) * COLUMNS;
    VF top = loadu(scores + first * VL);
    for (int v = first + 1; v < last; ++v) top = vmax(loadu(scores + v * VL), top);
    const float old = top_[row + i], now = std::max(old, hmax(top));
    base[i] = now == -INFINITY ? 0.0f : now;
    change[i] = old - base[i];
    top_[row + i] = now;
  }
  for (int i = 0; i < MR; i += VL) storeu(change + i, vexp2(loadu(change + i)));
  for (int i = 0; i < MR; ++i) {
    float* scores = scores_ + (ptrdiff_t)(row + i) * COLUMNS;
    float* weight = weight_ + (ptrdiff_t)(row + i) * VL;
    VF total{};
    for (int v = first; v < last; ++v) {
      const VF p = vexp2(loadu(scores + v * VL) - splat(base[i]));
      storeu(scores + v * VL, p);
      total += p;
    }
    // The product joins the sum here and not before the loop: it must contract alike in every copy of this function.
    storeu(weight, loadu(weight) * splat(change[i]) + total);
    rescale_[row + i] = change[i];
  }
}

// Scores and softmax weights of one strip; returns the columns that hold weights (the same for all its rows).
Range Worker::score_strip(const Tile& tile, int row, int row_begin, int row_end) {
  Range columns{0, COLUMNS}, visible[MR];
  const bool whole = row >= row_begin && row + MR <= row_end && tile.begin == 0 && tile.end == COLUMNS &&
                     positions_[row] >= tile.first + COLUMNS - 1 &&
                     window_begin(positions_[row + MR - 1]) <= tile.first;
  if (!whole) columns = mask_strip(tile, row, row_begin, row_end, visible);
  if (columns.begin >= columns.end) return {0, 0};
  const int first = columns.begin / VL, last = (columns.end + VL - 1) / VL;
  float* scores = scores_ + (ptrdiff_t)row * COLUMNS;
  for (int v = first; v < last; v += PANEL)
    strip<false>(queries_ + (ptrdiff_t)row * dim_, dim_, tile.keys + v * VL, COLUMNS, dim_, scores + v * VL, COLUMNS,
                 std::min(PANEL, last - v), nullptr);
  if (layout_.soft_cap) cap_strip(scores, first * VL, last * VL);
  if (tile.mass)
    for (int i = 0; i < MR; ++i)
      for (int c = first * VL; c < last * VL; c += VL)
        storeu(scores + i * COLUMNS + c, loadu(scores + i * COLUMNS + c) + loadu(tile.mass + c));
  if (!whole)
    for (int i = 0; i < MR; ++i)
      for (int c = first * VL; c < last * VL; ++c)
        if (c < visible[i].begin || c >= visible[i].end) scores[i * COLUMNS + c] = -INFINITY;
  if (whole)
    softmax_strip(row, 0, COLUMNS / VL);  // constant bounds: unrolled
  else
    softmax_strip(row, first, last);
  return columns;
}

// Caps the scores (base 2) of the columns [first, last) of a strip.
void Worker::cap_strip(float* scores, int first, int last) const {
  const float soft_cap = layout_.soft_cap * LOG2E;
  for (int i = 0; i < MR; ++i)
    for (int c = first; c < last; c += VL) {
      float* score = scores + i * COLUMNS + c;
      storeu(score, soft_capped(loadu(score), soft_cap));
    }
}

// Visible columns of each row of a strip, and their union. Rows outside [row_begin, row_end) see none.
Range Worker::mask_strip(const Tile& tile, int row, int row_begin, int row_end, Range* visible) const {
  Range all{COLUMNS, 0};
  for (int i = 0; i < MR; ++i) {
    visible[i] = {0, 0};
    if (row + i < row_begin || row + i >= row_end) continue;
    const int position = positions_[row + i];
    visible[i] = {std::max(tile.begin, window_begin(position) - tile.first),
                  std::min(tile.end, position + 1 - tile.first)};
    if (visible[i].begin >= visible[i].end) continue;
    all = {std::min(all.begin, visible[i].begin), std::max(all.end, visible[i].end)};
  }
  return all;
}

// Batch row of the token that a row of the task stands for.
int64_t Worker::token_of(int row) const {
  return request_.first_row + task_.first - request_.num_computed + row / group_;
}

uint8_t* Worker::row_of(const KvsRows& rows, int row) const {
  const int64_t bytes = rows.dtype == KVS_F32 ? 4 : 2;
  return (uint8_t*)rows.data + (token_of(row) * rows.token_stride + head_of(row) * rows.head_stride) * bytes;
}

void Worker::load_queries() {
  const float scale = layout_.scale * LOG2E;
  for (int row = 0; row < padded_; ++row) {
    float* to = queries_ + (ptrdiff_t)row * dim_;
    positions_[row] = row < rows_ ? task_.first + row / group_ : last_;
    if (row >= rows_) {
      std::fill_n(to, dim_, 0.0f);
      continue;
    }
    load_row(to, row_of(q_, row), dim_, q_.dtype);
    for (int d = 0; d < dim_; ++d) to[d] *= scale;
  }
  std::fill_n(sums_, (size_t)padded_ * dim_, 0.0f);
  std::fill_n(weight_, (size_t)padded_ * VL, 0.0f);
  std::fill_n(top_, padded_, -INFINITY);
  for (int row = 0; layout_.sink_logits && row < rows_; ++row) {
    top_[row] = layout_.sink_logits[head_of(row)] * LOG2E;
    weight_[(ptrdiff_t)row * VL] = 1.0f;
  }
}

void Worker::store_outputs() {
  for (int row = 0; row < rows_; ++row) {
    float* sums = sums_ + (ptrdiff_t)row * dim_;
    const float total = hsum(loadu(weight_ + (ptrdiff_t)row * VL));
    for (int d = 0; d < dim_; ++d) sums[d] /= total;
    if (layout_.value_rotated) hadamard(sums, dim_);
    store_row(row_of(out_, row), sums, dim_, out_.dtype);
    if (lse_) lse_[token_of(row) * layout_.num_heads + head_of(row)] = top_[row] * LN2 + std::log(total);
  }
}

void Worker::run(const Task& task) {
  task_ = task;
  last_ = task.first + task.count - 1;
  request_ = request_of(batch_, task.request);
  rows_ = task.count * group_;
  padded_ = round_up(rows_, MR);
  carve_scratch(padded_);
  load_queries();
  if (request_.kept_end) attend_kept();
  const int begin = std::max(window_begin(task.first), request_.kept_end);
  for (int tile = begin / tile_tokens_; tile <= last_ / tile_tokens_; ++tile) {
    const int first = tile * tile_tokens_;
    if (!all_dense(layout_)) attend_sealed(tile);
    const int query_end = all_dense(layout_) ? last_ + 1 : std::min(last_ + 1, first + tile_tokens_);
    for (int part = 0; part < tile_tokens_; part += COLUMNS) attend_dense(first + part, query_end);
  }
  store_outputs();
}

int64_t largest_power_of_two(int64_t x) {
  int64_t power = 1;
  while (power * 2 <= x) power *= 2;
  return power;
}

// Queries per task: a power of two, so that tasks start at tile borders wherever they can.
int queries_per_task(const KvsLayout& layout, int64_t queries, int threads) {
  const int group = layout.num_heads / layout.num_kv_heads;
  const int target = TARGET_ROWS * 64 / std::max(64, (int)layout.head_dim);
  int64_t count = largest_power_of_two(std::max(1, target / group));
  while (count * group / 2 >= MIN_ROWS && queries * layout.num_kv_heads / count < 4 * threads) count /= 2;
  return (int)count;
}

std::vector<Task> plan(const KvsLayout& layout, const KvsBatch& batch, const int32_t* requests, int32_t n) {
  int64_t queries = 0;
  for (int i = 0; i < n; ++i)
    queries += batch.query_start_loc[requests[i] + 1] - batch.query_start_loc[requests[i]];
  const int step = queries_per_task(layout, queries, kvs_num_threads());
  std::vector<Task> tasks;
  for (int i = 0; i < n; ++i) {
    const int r = requests[i], end = batch.seq_lens[r];
    for (int first = end - (batch.query_start_loc[r + 1] - batch.query_start_loc[r]); first < end;) {
      const int next = std::min(end, (first / step + 1) * step);
      const int seen = layout.sliding_window ? std::min(next, layout.sliding_window + next - first) : next;
      for (int h = 0; h < layout.num_kv_heads; ++h)
        tasks.push_back({r, h, first, next - first, (int64_t)(next - first) * seen});
      first = next;
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return tasks;
}

}  // namespace

void attend_extend(const KvsLayout& layout, const KvsBatch& batch, const KvsArena& arena, const float* staged,
                   const KvsRows& q, const KvsRows& out, float* lse, const int32_t* req_ids, int32_t n) {
  const std::vector<Task> tasks = plan(layout, batch, req_ids, n);
#pragma omp parallel
  {
    Worker worker(layout, batch, arena, staged, q, out, lse);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i) worker.run(tasks[i]);
  }
}

}  // namespace kvs
