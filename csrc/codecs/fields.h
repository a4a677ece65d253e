// Params and sections of a KvsCodec by their names (kvserve/codecs/: `params` and `own_sections` of each class).
#pragma once
#include "../kvserve.h"

#ifdef __CUDACC__
#define KVS_BOTH __host__ __device__  // csrc/cuda/ finds its pages, and what is in them, as the CPU kernels do
#else
#define KVS_BOTH
#endif

namespace kvs {

// Where both halves are a codec without wrappers.
KVS_BOTH inline const KvsCodec& key_codec(const KvsLayout& l) { return l.key.stage[0]; }
KVS_BOTH inline const KvsCodec& value_codec(const KvsLayout& l) { return l.value.stage[0]; }

// KVS_AFFINE, KVS_SYMMETRIC, KVS_TABLE
KVS_BOTH inline int bits_of(const KvsCodec& c) { return c.params[0]; }
KVS_BOTH inline int64_t codes_at(const KvsCodec& c) { return c.at[0]; }

// KVS_AFFINE, and KVS_SYMMETRIC as one without boost that has one group of all channels
enum Axis : int32_t { BY_CHANNEL = 0, BY_TOKEN = 1 };  // what has scales of its own; groups run along the other axis
KVS_BOTH inline int group_of(const KvsCodec& c, int head_dim) {
  return c.kind == KVS_SYMMETRIC ? head_dim : c.params[1];
}
KVS_BOTH inline int boosted_of(const KvsCodec& c) { return c.params[2]; }  // channels
KVS_BOTH inline int axis_of(const KvsCodec& c) { return c.params[3]; }
inline bool is_clipped(const KvsCodec& c) { return c.params[4]; }  // its table: a factor for each group of a token
KVS_BOTH inline int64_t scales_at(const KvsCodec& c) { return c.at[boosted_of(c) ? 2 : 1]; }
KVS_BOTH inline bool is_affine_by_channel(const KvsHalf& half) {
  return half.stages == 1 && half.stage[0].kind == KVS_AFFINE && axis_of(half.stage[0]) == BY_CHANNEL;
}
KVS_BOTH inline bool is_affine_by_token(const KvsHalf& half) {
  const KvsCodec& c = half.stage[0];
  return half.stages == 1 && (c.kind == KVS_SYMMETRIC || (c.kind == KVS_AFFINE && axis_of(c) == BY_TOKEN));
}
KVS_BOTH inline int64_t boost_codes_at(const KvsCodec& c) { return c.at[1]; }
KVS_BOTH inline int64_t boost_index_at(const KvsCodec& c) { return c.at[3]; }

// KVS_TABLE: tables are levels, and a calibrated range of each channel unless each token has its own
inline bool has_token_ranges(const KvsCodec& c) { return c.params[1]; }
inline int64_t high_codes_at(const KvsCodec& c) { return c.at[1]; }  // of 3-bit codes
inline int64_t token_ranges_at(const KvsCodec& c) { return c.at[bits_of(c) == 3 ? 2 : 1]; }

// KVS_VECTOR: channels of one code
inline int couple_of(const KvsCodec& c) { return c.params[0]; }

// KVS_OUTLIERS
inline int outliers_of(const KvsCodec& c) { return c.params[0]; }
inline int64_t outlier_values_at(const KvsCodec& c) { return c.at[0]; }
inline int64_t outlier_index_at(const KvsCodec& c) { return c.at[1]; }

// KVS_LOW_RANK
inline int rank_of(const KvsCodec& c) { return c.params[0]; }
inline int64_t left_at(const KvsCodec& c) { return c.at[0]; }
inline int64_t right_at(const KvsCodec& c) { return c.at[1]; }

// KVS_BEFORE_ROPE: its table has `positions_of` columns, a param that comes from the table and not from the class
inline int rotary_dim_of(const KvsCodec& c) { return c.params[0]; }
inline bool is_interleaved(const KvsCodec& c) { return c.params[1]; }
inline int positions_of(const KvsCodec& c) { return c.params[2]; }

}  // namespace kvs
