// kvs_attention_sums: the attention that a request's last queries pay to each token it holds, from keys alone.
//
// One KV head and one block of queries at a time, in three phases: logits of the block, softmax of each row, and the
// sums of each column. Keys lie in panels of 64 columns; logits in [panel][row][64], rows in [query][head of the group].
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "codecs/codec.h"
#include "gemm.h"
#include "geometry.h"

namespace kvs {
namespace {

constexpr int64_t MAX_LOGITS = 1 << 20;  // of a block of queries, unless one query has more

enum class Source { SINKS, KEPT, SEALED, DENSE };

// Keys that are decoded together, at most a tile.
struct Part {
  Source source;
  int32_t count, panel;  // tokens; the first panel
  const KvsLayout* layout;  // of the format of its page
  const uint8_t* page;      // null where it has none
};

struct Panel {
  int32_t first;   // position of the first token
  int32_t count;   // tokens, at most 64
  int64_t column;  // of the sums
  // How many of the tokens a query sees: always the first ones.
  int seen(int32_t position) const { return std::clamp(position + 1 - first, 0, count); }
};

// The tokens one KV head holds, in the order of its columns.
struct Held {
  std::vector<Part> parts;
  std::vector<Panel> panels;
  int64_t columns = 0;

  void add(Source source, int32_t first, int32_t count, const KvsLayout& layout, const uint8_t* page = nullptr) {
    parts.push_back({source, count, int32_t(panels.size()), &layout, page});
    for (int32_t t = 0; t < count; t += COLUMNS) {
      const int32_t n = std::min(COLUMNS, count - t);
      panels.push_back({first + t, n, columns});
      columns += n;
    }
  }
};

Held held_by(const KvsLayout& l, const KvsArena& a, const Request& q, int32_t kv_head) {
  Held held;
  const int32_t size = l.tile_tokens ? l.tile_tokens : COLUMNS;
  if (q.kept_end) {
    // Every query stands at kept_end >= size or later, so it sees whatever claims a position below `size`.
    const KvsKept kept = kept_of(a, q.row, kv_head);
    if (l.sink_tokens) held.add(Source::SINKS, 0, l.sink_tokens, l);
    for (int32_t i = 0; i < kept.num_runs; ++i) {
      const KvsRun& run = kept.runs[i];
      const KvsLayout& layout = layout_of(l, run.format);
      for (int32_t first = 0, tile = 0; first < run.num_tokens; first += size, ++tile)
        held.add(Source::KEPT, 0, std::min(size, run.num_tokens - first), layout,
                 kept_tile(layout, a, q.kept_blocks, run.first_page, tile));
    }
  }
  for (int32_t first = q.kept_end; first < q.seq_len; first += size) {
    const bool sealed = l.tile_tokens && first + size <= q.seq_len;
    held.add(sealed ? Source::SEALED : Source::DENSE, first, std::min(size, q.seq_len - first), l,
             sealed ? tile_page(l, a, q, kv_head, first / size) : nullptr);
  }
  return held;
}

struct KeyScratch {
  std::vector<float> panels, rows;  // [tile_tokens / 64][head_dim][64], [64][head_dim]
  explicit KeyScratch(const KvsLayout& l)
      : panels(size_t(std::max(l.tile_tokens, COLUMNS)) * l.head_dim), rows(size_t(COLUMNS) * l.head_dim) {}
};

class Sums {
 public:
  Sums(const KvsLayout& l, const KvsArena& a, const Request& request, const KvsRows& query, int32_t num_queries,
       bool square, bool maximum, float* sums, int64_t columns)
      : l(l), a(a), request(request), query(query), num_queries(num_queries), square(square), maximum(maximum),
        sums(sums), columns(columns), group(l.num_heads / l.num_kv_heads) {}

  void run(int32_t head) {
    kv_head = head;
    held = held_by(l, a, request, head);
    std::fill_n(sums + int64_t(head) * group * columns, group * columns, 0.0f);
    const int64_t of_query = std::max<int64_t>(int64_t(held.panels.size()) * COLUMNS * group, 1);
    const int32_t step = int32_t(std::clamp<int64_t>(MAX_LOGITS / of_query, 1, num_queries));
    reserve(step);
    for (int32_t first = 0; first < num_queries; first += step) run_block(first, std::min(step, num_queries - first));
  }

 private:
  const KvsLayout& l;
  const KvsArena& a;
  const Request& request;
  const KvsRows& query;
  const int32_t num_queries;
  const bool square, maximum;
  float* sums;  // [num_heads][columns]
  const int64_t columns;
  const int32_t group;

  int32_t kv_head = 0;
  Held held;
  int32_t first_query = 0, rows = 0, padded = 0;  // of the block; padded to whole strips
  std::unique_ptr<float[]> logits, queries;
  std::vector<float> factors;  // of each row: 1 / softmax denominator

  void reserve(int32_t queries_of_block) {
    const size_t most = size_t(queries_of_block * group + MR - 1) / MR * MR;
    logits.reset(new float[held.panels.size() * most * COLUMNS]);
    queries.reset(new float[most * l.head_dim]);
    factors.resize(most);
  }

  int32_t position_of(int32_t row) const { return request.seq_len - num_queries + first_query + row / group; }
  float* logits_of(size_t panel, int32_t row) const { return logits.get() + (panel * padded + row) * COLUMNS; }

  void run_block(int32_t first, int32_t count) {
    first_query = first;
    rows = count * group;
    padded = (rows + MR - 1) / MR * MR;
#pragma omp parallel
    {
      KeyScratch scratch(l);
#pragma omp for schedule(static)
      for (int32_t row = 0; row < padded; ++row) load_query(row);
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < held.parts.size(); ++i) score(held.parts[i], scratch);
#pragma omp for schedule(static)
      for (int32_t row = 0; row < rows; ++row) exponentiate(row);
#pragma omp for schedule(static)
      for (size_t panel = 0; panel < held.panels.size(); ++panel) add_columns(panel);
    }
  }

  // A row of zeros as padding; others times the softmax scale, for logits of base 2.
  void load_query(int32_t row) {
    float* to = queries.get() + int64_t(row) * l.head_dim;
    if (row >= rows) return (void)std::fill_n(to, l.head_dim, 0.0f);
    load_row(to, row_at(query, first_query + row / group, kv_head * group + row % group), l.head_dim, query.dtype);
    for (int d = 0; d < l.head_dim; d += VL) storeu(to + d, loadu(to + d) * (l.scale * LOG2E));
  }

  // Logits of a part's keys. Columns that a row does not see may hold anything.
  void score(const Part& part, KeyScratch& s) {
    if (held.panels[part.panel].seen(position_of(rows - 1)) == 0) return;
    load_keys(part, s);
    const float* keys = s.panels.data();
    const size_t end = part.panel + (part.count + COLUMNS - 1) / COLUMNS;
    for (size_t panel = part.panel; panel < end; ++panel, keys += int64_t(l.head_dim) * COLUMNS)
      for (int32_t row = 0; row < padded; row += MR) {
        if (held.panels[panel].seen(position_of(row + MR - 1)) == 0) continue;
        const float* strip_queries = queries.get() + int64_t(row) * l.head_dim;
        for (int v = 0; v < COLUMNS; v += PANEL * VL)
          strip<false>(strip_queries, l.head_dim, keys + v, COLUMNS, l.head_dim, logits_of(panel, row) + v, COLUMNS,
                       PANEL, nullptr);
        if (l.soft_cap) cap_strip(logits_of(panel, row));
        if (part.layout->mass && part.source == Source::KEPT) add_masses(part, panel, row);
      }
  }

  // Caps the logits (base 2) of one panel, for a strip of rows.
  KVS_NOINLINE void cap_strip(float* x) const {
    for (int i = 0; i < MR * COLUMNS; i += VL) storeu(x + i, soft_capped(loadu(x + i), l.soft_cap * LOG2E));
  }

  // The log-masses of a kept page to the logits of one panel, for a strip of rows.
  void add_masses(const Part& part, size_t panel, int32_t row) const {
    const float* masses = masses_of(*part.layout, part.page) + (panel - part.panel) * COLUMNS;
    for (int i = 0; i < MR; ++i) {
      float* x = logits_of(panel, row + i);
      for (int v = 0; v < COLUMNS; v += VL) storeu(x + v, loadu(x + v) + loadu(masses + v) * LOG2E);
    }
  }

  void load_keys(const Part& part, KeyScratch& s) const {
    if (all_dense(l)) return gather(part, s);
    if (part.source == Source::KEPT)
      return decode_panels(key_tile(*part.layout, kv_head, ANYWHERE), part.page, s.panels.data());
    if (part.source != Source::SEALED) return gather(part, s);
    const int32_t first = held.panels[part.panel].first;
    decode_panels(key_tile(l, kv_head, first), part.page, s.panels.data());
    for (int32_t t = 0; first == 0 && t < l.sink_tokens; ++t) {  // the page does not count them
      load_row(s.rows.data(), sink_slot(l, a, request.row, kv_head, t), l.head_dim, l.dense_dtype);
      float* column = s.panels.data() + int64_t(t / COLUMNS) * l.head_dim * COLUMNS + t % COLUMNS;
      for (int d = 0; d < l.head_dim; ++d) column[d * COLUMNS] = s.rows[d];
    }
  }

  // Dense keys; the columns behind them are zero.
  void gather(const Part& part, KeyScratch& s) const {
    for (int32_t first = 0; first < part.count; first += COLUMNS) {
      const int32_t count = std::min(COLUMNS, part.count - first);
      for (int32_t t = 0; t < count; ++t)
        load_row(s.rows.data() + t * l.head_dim, slot_of(part, first + t), l.head_dim, l.dense_dtype);
      std::fill(s.rows.begin() + count * l.head_dim, s.rows.end(), 0.0f);
      float* panel = s.panels.data() + first * l.head_dim;
      for (int t = 0; t < COLUMNS; t += VL)
        for (int d = 0; d < l.head_dim; d += VL)
          transpose_block(s.rows.data() + t * l.head_dim + d, l.head_dim, panel + d * COLUMNS + t, COLUMNS);
    }
  }

  const uint8_t* slot_of(const Part& part, int32_t t) const {
    if (part.source == Source::SINKS) return sink_slot(l, a, request.row, kv_head, t);
    if (part.source == Source::KEPT) return part.page + t * slot_bytes(l);
    const int32_t position = held.panels[part.panel].first + t;
    if (part.source == Source::SEALED && position < l.sink_tokens)
      return sink_slot(l, a, request.row, kv_head, position);
    return all_dense(l) ? stored_slot(l, a, request, kv_head, position)
                        : tail_slot(l, a, request.row, kv_head, position);
  }

  // Logits of one row to 2 ** (logit - maximum), 0 where it does not see the token, and the row's factor.
  void exponentiate(int32_t row) {
    const int32_t position = position_of(row);
    VF tops = splat(NEG_INF), total{};
    size_t end = 0;
    for (int seen; end < held.panels.size() && (seen = held.panels[end].seen(position)); ++end) {
      float* x = logits_of(end, row);
      std::fill(x + seen, x + COLUMNS, NEG_INF);
      for (int v = 0; v < COLUMNS; v += VL) tops = vmax(tops, loadu(x + v));
    }
    const float sink = sink_of(row), highest = std::max(hmax(tops), sink);
    const VF top = splat(highest);
    for (size_t panel = 0; panel < end; ++panel) {
      float* x = logits_of(panel, row);
      for (int v = 0; v < COLUMNS; v += VL) {
        const VF weight = vexp2(loadu(x + v) - top);
        storeu(x + v, weight);
        total += weight;
      }
    }
    const float of_sink = l.sink_logits ? std::exp2(sink - highest) : 0.0f;
    factors[row] = 1.0f / (hsum(total) + of_sink);
  }

  // The logit (base 2) of the learned sink of a row's head.
  float sink_of(int32_t row) const {
    return l.sink_logits ? l.sink_logits[kv_head * group + row % group] * LOG2E : NEG_INF;
  }

  // The block's rows into the sums of one panel's tokens.
  void add_columns(size_t index) {
    const Panel& panel = held.panels[index];
    for (int32_t head = 0; head < group; ++head) {
      VF reduced[COLUMNS / VL] = {};
      const int32_t first_seen = std::max(0, panel.first - position_of(0));  // the first query that sees the panel
      for (int32_t row = first_seen * group + head; row < rows; row += group) {
        const float* x = logits_of(index, row);
        for (int v = 0; v < COLUMNS / VL; ++v) {
          VF p = loadu(x + v * VL) * factors[row];
          if (square) p *= p;
          reduced[v] = maximum ? vmax(reduced[v], p) : reduced[v] + p;
        }
      }
      float* to = sums + (int64_t(kv_head) * group + head) * columns + panel.column;
      for (int t = 0; t < panel.count; ++t) {
        const float x = reduced[t / VL][t % VL];
        to[t] = maximum ? std::max(to[t], x) : to[t] + x;
      }
    }
  }
};

}  // namespace
}  // namespace kvs

using namespace kvs;

void kvs_attention_sums(const KvsLayout* layout, const KvsArena* arena, const int32_t* row, int32_t kept_end,
                        const int32_t* kept_blocks, int32_t num_tokens, const KvsRows* query, int32_t num_queries,
                        int32_t power, int32_t maximum, float* sums, int64_t columns) {
  const Request request{0, num_tokens, num_tokens, row, kept_end, kept_blocks};
  Sums task(*layout, *arena, request, *query, num_queries, power == 2, maximum, sums, columns);
  for (int32_t head = 0; head < layout->num_kv_heads; ++head) task.run(head);
}
