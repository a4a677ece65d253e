// The codecs by their kind.
#include "codecs/affine.h"
#include "codecs/before_rope.h"
#include "codecs/low_rank.h"
#include "codecs/outliers.h"
#include "codecs/table.h"
#include "codecs/vector.h"

namespace kvs {
namespace {

// Writes the sections of a stage and of those after it. rows: [tokens][head_dim], used up.
using EncodeStage = void (*)(const HalfTile&, int stage, float* rows, uint8_t* page, CodeScratch&);
// What a stage and those after it decode to.
using DecodeStage = void (*)(const HalfTile&, int stage, const uint8_t* page, float* panels);

struct CodecOps {
  EncodeStage encode;
  DecodeStage decode;
};

// By KvsKind.
constexpr CodecOps CODECS[] = {
    {nullptr, nullptr},
    {encode_affine, decode_affine},
    {encode_symmetric, decode_symmetric},
    {encode_table, decode_table},
    {encode_vector, decode_vector},
    {encode_outliers, decode_outliers},
    {encode_low_rank, decode_low_rank},
    {encode_before_rope, decode_before_rope},
};

}  // namespace

void encode_stage(const HalfTile& t, int stage, float* rows, uint8_t* page, CodeScratch& s) {
  CODECS[t.chain.stage[stage].kind].encode(t, stage, rows, page, s);
}

void decode_stage(const HalfTile& t, int stage, const uint8_t* page, float* panels) {
  CODECS[t.chain.stage[stage].kind].decode(t, stage, page, panels);
}

}  // namespace kvs
