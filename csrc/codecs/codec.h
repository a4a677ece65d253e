// The codecs by their kind: how a half of a tile is written and read, stage by stage.
#pragma once
#include "affine.h"
#include "before_rope.h"
#include "low_rank.h"
#include "outliers.h"
#include "table.h"
#include "vector.h"

namespace kvs {

// Writes the sections of a stage and of those after it. rows: [tokens][head_dim], used up.
using EncodeStage = void (*)(const HalfTile&, int stage, float* rows, uint8_t* page, CodeScratch&);
// What a stage and those after it decode to.
using DecodeStage = void (*)(const HalfTile&, int stage, const uint8_t* page, float* panels);

struct CodecOps {
  EncodeStage encode;
  DecodeStage decode;
};

// By KvsKind.
inline constexpr CodecOps CODECS[] = {
    {nullptr, nullptr},
    {encode_affine, decode_affine},
    {encode_symmetric, decode_symmetric},
    {encode_table, decode_table},
    {encode_vector, decode_vector},
    {encode_outliers, decode_outliers},
    {encode_low_rank, decode_low_rank},
    {encode_before_rope, decode_before_rope},
};

inline void encode_stage(const HalfTile& t, int stage, float* rows, uint8_t* page, CodeScratch& s) {
  CODECS[t.chain.stage[stage].kind].encode(t, stage, rows, page, s);
}
inline void decode_stage(const HalfTile& t, int stage, const uint8_t* page, float* panels) {
  CODECS[t.chain.stage[stage].kind].decode(t, stage, page, panels);
}

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

}  // namespace kvs
