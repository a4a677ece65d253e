// Sealing one tile of one KV head, as the reference's `encode_page`.
#pragma once
#include <algorithm>

#include "codecs/codec.h"
#include "geometry.h"

namespace kvs {

// Buffers for one tile.
struct TileScratch {
  float key[MAX_TILE * MAX_DIM], value[MAX_TILE * MAX_DIM];  // [token][head_dim]
  CodeScratch codes;
};

inline void write_slot(const KvsLayout& l, const float* key, const float* value, uint8_t* slot) {
  store_row(slot, key, l.head_dim, l.dense_dtype);
  store_row(slot + slot_bytes(l) / 2, value, l.head_dim, l.dense_dtype);
}

// Which tile of which KV head: its tokens have the positions from `first_position` on, those before the first_counted-th
// define no range.
struct TilePlace {
  int32_t kv_head, first_position, first_counted;
};

// Writes every section of `page`, and zeroes its padding, from s.key and s.value, which are used up.
inline void encode_page(const KvsLayout& l, TileScratch& s, const TilePlace& place, uint8_t* page) {
  if (all_dense(l)) {
    for (int t = 0; t < l.tile_tokens; ++t, page += slot_bytes(l))
      write_slot(l, s.key + t * l.head_dim, s.value + t * l.head_dim, page);
    return;
  }
  std::fill(page, page + l.page_bytes, uint8_t(0));
  HalfTile keys = key_tile(l, place.kv_head, place.first_position);
  HalfTile values = value_tile(l, place.kv_head, place.first_position);
  keys.first_counted = values.first_counted = place.first_counted;
  encode_rows(keys, s.key, page, s.codes);
  encode_rows(values, s.value, page, s.codes);
}

}  // namespace kvs
