// kvs_store_sealed: tiles completed by this step (dense policy: all its tokens).
#include <algorithm>
#include <memory>
#include <vector>

#include "encode.h"
#include "geometry.h"

namespace kvs {
namespace {

struct Tile {
  Request request;
  int32_t index, kv_head;
};

std::vector<Tile> completed_tiles(const KvsLayout& l, const KvsBatch& b) {
  std::vector<Tile> tiles;
  for (int32_t r = 0; r < b.num_reqs; ++r) {
    const Request q = request_of(b, r);
    for (int32_t i = q.num_computed / l.tile_tokens; i < q.seq_len / l.tile_tokens; ++i)
      for (int32_t h = 0; h < l.num_kv_heads; ++h) tiles.push_back({q, i, h});
  }
  return tiles;
}

// K and V of the tile, float32: from the tail slots where older than this step, else staged.
void gather(const KvsLayout& l, const KvsArena& a, const float* staged, const Tile& tile, TileScratch& s) {
  const Request& q = tile.request;
  for (int32_t t = 0; t < l.tile_tokens; ++t) {
    const int32_t p = tile.index * l.tile_tokens + t;
    float *key = s.key + t * l.head_dim, *value = s.value + t * l.head_dim;
    if (p < q.num_computed) {
      const uint8_t* slot = tail_slot(l, a, q.row, tile.kv_head, p);
      load_row(key, slot, l.head_dim, l.dense_dtype);
      load_row(value, slot + slot_bytes(l) / 2, l.head_dim, l.dense_dtype);
    } else {
      const float* row = staged_row(l, staged, q.first_row + p - q.num_computed, tile.kv_head);
      load_row(key, row, l.head_dim, KVS_F32);
      load_row(value, row + l.head_dim, l.head_dim, KVS_F32);
    }
  }
}

void seal(const KvsLayout& l, const KvsArena& a, const float* staged, const Tile& tile, TileScratch& s) {
  const int32_t sinks = tile.index == 0 ? l.sink_tokens : 0;
  gather(l, a, staged, tile, s);
  for (int32_t t = 0; t < sinks; ++t)
    write_slot(l, s.key + t * l.head_dim, s.value + t * l.head_dim,
               sink_slot(l, a, tile.request.row, tile.kv_head, t));
  const TilePlace place{tile.kv_head, tile.index * l.tile_tokens, sinks};
  encode_page(l, s, place, tile_page(l, a, tile.request, tile.kv_head, tile.index));
}

void store_dense(const KvsLayout& l, const KvsBatch& b, const KvsArena& a, const float* staged) {
#pragma omp parallel for schedule(dynamic, 1) if (b.query_start_loc[b.num_reqs] > 8)
  for (int32_t r = 0; r < b.num_reqs; ++r) {
    const Request q = request_of(b, r);
    for (int32_t p = q.num_computed; p < q.seq_len; ++p)
      for (int32_t h = 0; h < l.num_kv_heads; ++h) {
        const float* from = staged_row(l, staged, q.first_row + p - q.num_computed, h);
        store_row(dense_slot(l, a, q.row, h, p), from, 2 * l.head_dim, l.dense_dtype);
      }
  }
}

}  // namespace
}  // namespace kvs

using namespace kvs;

void kvs_store_sealed(const KvsLayout* layout, const KvsBatch* batch, const KvsArena* arena, const float* staged) {
  const KvsLayout& l = *layout;
  if (!l.tile_tokens) return store_dense(l, *batch, *arena, staged);
  const std::vector<Tile> tiles = completed_tiles(l, *batch);
  if (tiles.empty()) return;
#pragma omp parallel if (tiles.size() > 1)
  {
    const std::unique_ptr<TileScratch> scratch(new TileScratch);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tiles.size(); ++i) seal(l, *arena, staged, tiles[i], *scratch);
  }
}
