// How kernels write and read a half of a tile, whatever its codecs are (csrc/codecs.cpp).
#pragma once
#include "tile.h"

namespace kvs {

// The halves of a coded page, of which `first_position` is the position of the first token.
inline HalfTile key_tile(const KvsLayout& l, int32_t kv_head, int32_t first_position) {
  return {l.key, true, l.tile_tokens, l.head_dim, kv_head, first_position};
}
inline HalfTile value_tile(const KvsLayout& l, int32_t kv_head, int32_t first_position) {
  return {l.value, false, l.tile_tokens, l.head_dim, kv_head, first_position};
}

// The first position of kept tokens: codecs that need positions refuse pages of them before a kernel is called.
constexpr int32_t ANYWHERE = 0;

// Keys to panels [tile_tokens / 64][head_dim][64], values to [head_dim / 64, rounded up][tile_tokens][64]; values stay
// rotated where the policy rotates.
inline void decode_panels(const HalfTile& t, const uint8_t* page, float* panels) { decode_stage(t, 0, page, panels); }
// rows: [tokens][head_dim], used up.
inline void encode_rows(const HalfTile& t, float* rows, uint8_t* page, CodeScratch& s) {
  encode_stage(t, 0, rows, page, s);
}

}  // namespace kvs
