// kvs_read: stored tokens back to rows. kvs_read_kept, kvs_write_kept: the rows that an evicted request keeps, from and
// to its kept pages.
#include <algorithm>
#include <memory>
#include <vector>

#include "codecs/panels.h"
#include "encode.h"
#include "geometry.h"
#include "rotate.h"

namespace kvs {
namespace {

// One half of a page as it is decoded, and then as rows [token][head_dim].
struct PageRows {
  float panels[MAX_TILE * MAX_DIM], rows[MAX_TILE * MAX_DIM];
};

// Tokens [first, last) of one request.
struct Span {
  Request request;
  int32_t first, last;
};

// Tokens [first, last) of a page.
void read_half(const KvsLayout& l, const HalfTile& half, const uint8_t* page, int first, int last, float* to,
               PageRows& s) {
  const int dim = l.head_dim;
  decode_panels(half, page, s.panels);
  panels_to_rows(half, s.panels, s.rows);
  std::copy(s.rows + first * dim, s.rows + last * dim, to);
  for (int t = first; !half.keys && l.value_rotated && t < last; ++t, to += dim) hadamard(to, dim);
}

void read_slot(const KvsLayout& l, const uint8_t* slot, float* key, float* value) {
  load_row(key, slot, l.head_dim, l.dense_dtype);
  if (!value) return;
  load_row(value, slot + slot_bytes(l) / 2, l.head_dim, l.dense_dtype);
  if (l.value_rotated) hadamard(value, l.head_dim);
}

// What a span takes from tile i, to the span's rows of one KV head; value may be null.
void read_tile(const KvsLayout& l, const KvsArena& a, const Span& span, int32_t kv_head, int32_t i, float* key,
               float* value, PageRows& s) {
  const Request& q = span.request;
  const int32_t start = i * l.tile_tokens, last = std::min(span.last, start + l.tile_tokens);
  const bool sealed = start + l.tile_tokens <= q.num_computed;
  const int32_t slots_end = sealed && !all_dense(l) ? std::min(last, l.sink_tokens) : last;
  int32_t p = std::max(span.first, start);
  for (; p < slots_end; ++p) {
    const bool is_sink = sealed && p < l.sink_tokens;
    const uint8_t* slot = is_sink ? sink_slot(l, a, q.row, kv_head, p) : stored_slot(l, a, q, kv_head, p);
    const int64_t at = int64_t(p - span.first) * l.head_dim;
    read_slot(l, slot, key + at, value ? value + at : nullptr);
  }
  if (p >= last) return;
  const uint8_t* page = tile_page(l, a, q, kv_head, i);
  const int64_t at = int64_t(p - span.first) * l.head_dim;
  read_half(l, key_tile(l, kv_head, start), page, p - start, last - start, key + at, s);
  if (value) read_half(l, value_tile(l, kv_head, start), page, p - start, last - start, value + at, s);
}

struct KeptTile {
  const KvsLayout& layout;  // of its format
  int32_t kv_head;
  uint8_t* page;
  int64_t first, last;  // rows
};

// What the headers of a layer's KV heads name, [num_kv_heads] of them.
std::vector<KeptTile> kept_tiles(const KvsLayout& l, const KvsArena& a, const int32_t* kept_blocks,
                                 const KvsKept* kept, const int64_t* offsets) {
  std::vector<KeptTile> tiles;
  for (int32_t h = 0; h < l.num_kv_heads; ++h) {
    int64_t start = offsets[h];
    for (int32_t r = 0; r < kept[h].num_runs; start += kept[h].runs[r++].num_tokens) {
      const KvsRun& run = kept[h].runs[r];
      const KvsLayout& layout = layout_of(l, run.format);
      for (int32_t t = 0, i = 0; t < run.num_tokens; t += l.tile_tokens, ++i)
        tiles.push_back({layout, h, kept_tile(layout, a, kept_blocks, run.first_page, i), start + t,
                         start + std::min(t + l.tile_tokens, run.num_tokens)});
    }
  }
  return tiles;
}

// The tile's rows as encode_page wants them; the last one fills what is left.
void load_tile(const KvsLayout& l, const KeptTile& tile, const float* key, const float* value, TileScratch& s) {
  const int dim = l.head_dim, count = int(tile.last - tile.first);
  std::copy_n(key + tile.first * dim, int64_t(count) * dim, s.key);
  std::copy_n(value + tile.first * dim, int64_t(count) * dim, s.value);
  for (int t = 0; l.value_rotated && t < count; ++t) hadamard(s.value + t * dim, dim);
  for (int t = count; t < l.tile_tokens; ++t) {
    std::copy_n(s.key + (count - 1) * dim, dim, s.key + t * dim);
    std::copy_n(s.value + (count - 1) * dim, dim, s.value + t * dim);
  }
}

}  // namespace
}  // namespace kvs

using namespace kvs;

void kvs_read(const KvsLayout* layout, const KvsArena* arena, const int32_t* row, int32_t num_tokens, int32_t first,
              int32_t last, float* key, float* value) {
  const KvsLayout& l = *layout;
  if (first >= last) return;
  const Span span{{0, num_tokens, num_tokens, row}, first, last};
  const int32_t tile = first / l.tile_tokens, tiles = (last - 1) / l.tile_tokens - tile + 1;
  const int64_t head_elements = int64_t(last - first) * l.head_dim;
#pragma omp parallel if (tiles * l.num_kv_heads > 1)
  {
    const std::unique_ptr<PageRows> scratch(new PageRows);
#pragma omp for schedule(dynamic, 1)
    for (int32_t i = 0; i < tiles * l.num_kv_heads; ++i) {
      const int32_t h = i / tiles;
      float* head_value = value ? value + h * head_elements : nullptr;
      read_tile(l, *arena, span, h, tile + i % tiles, key + h * head_elements, head_value, *scratch);
    }
  }
}

void kvs_read_kept(const KvsLayout* layout, const KvsArena* arena, const int32_t* kept_blocks, const KvsKept* kept,
                   const int64_t* offsets, float* key, float* value, float* log_mass) {
  const std::vector<KeptTile> tiles = kept_tiles(*layout, *arena, kept_blocks, kept, offsets);
#pragma omp parallel if (tiles.size() > 1)
  {
    const std::unique_ptr<PageRows> scratch(new PageRows);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tiles.size(); ++i) {
      const KeptTile& tile = tiles[i];
      const KvsLayout& l = tile.layout;
      const uint8_t* page = tile.page;
      const int count = int(tile.last - tile.first);
      for (int64_t t = 0; all_dense(l) && t < count; ++t) {
        const int64_t at = (tile.first + t) * l.head_dim;
        read_slot(l, page + t * slot_bytes(l), key + at, value + at);
      }
      if (all_dense(l)) continue;
      if (l.mass) std::copy_n(masses_of(l, page), count, log_mass + tile.first);
      const int64_t at = tile.first * l.head_dim;
      read_half(l, key_tile(l, tile.kv_head, ANYWHERE), page, 0, count, key + at, *scratch);
      read_half(l, value_tile(l, tile.kv_head, ANYWHERE), page, 0, count, value + at, *scratch);
    }
  }
}

void kvs_write_kept(const KvsLayout* layout, const KvsArena* arena, int32_t state_block, const int32_t* kept_blocks,
                    const KvsKept* kept, const int64_t* offsets, const float* key, const float* value,
                    const float* log_mass) {
  for (int32_t h = 0; h < layout->num_kv_heads; ++h) memcpy(cell(*arena, state_block, h), kept + h, sizeof *kept);
  const std::vector<KeptTile> tiles = kept_tiles(*layout, *arena, kept_blocks, kept, offsets);
#pragma omp parallel if (tiles.size() > 1)
  {
    const std::unique_ptr<TileScratch> scratch(new TileScratch);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tiles.size(); ++i) {
      const KeptTile& tile = tiles[i];
      const KvsLayout& l = tile.layout;
      load_tile(l, tile, key, value, *scratch);
      encode_page(l, *scratch, {tile.kv_head, ANYWHERE, 0}, tile.page);
      if (l.mass && log_mass) memcpy(tile.page + l.mass, log_mass + tile.first, size_t(tile.last - tile.first) * 4);
    }
  }
}
