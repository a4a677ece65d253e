// From the C interface to one instance of the kernels: checks, choice of the shape, size of shared memory.
#pragma once
#include "../codecs/fields.h"
#include "api.h"
#include "merge.h"

namespace kvs::gpu {

constexpr int MAX_WARPS = 4, MAX_STAGES = 4;

// How a launch uses a multiprocessor; shared_bytes 0: it does not fit.
struct Block {
  int warps, stages;
  int64_t shared_bytes;
};

inline const char* unsupported(const KvsLayout& layout) {
  const auto covered = [](const KvsCodec& codec) { return bits_of(codec) == 2 || bits_of(codec) == 4; };
  if (!is_affine_by_channel(layout.key) || !covered(key_codec(layout)))
    return "the CUDA kernels read keys of 2 or 4 bits; use Triton";
  if (!is_affine_by_token(layout.value) || !covered(value_codec(layout)))
    return "the CUDA kernels read values of 2 or 4 bits; use Triton";
  if (layout.mass) return "the CUDA kernels add no log-masses to logits; use Triton";
  if (layout.soft_cap) return "the CUDA kernels do not cap logits; use Triton";
  if (layout.sink_logits) return "the CUDA kernels have no learned sinks; use Triton";
  if (layout.num_formats > 1) return "the CUDA kernels read kept pages of one format; use Triton";
  if (layout.head_dim != 64 && layout.head_dim != 128)
    return "the CUDA kernels support head_dim 64 and 128; use Triton";
  if (layout.dense_dtype != KVS_F16 && layout.dense_dtype != KVS_BF16)
    return "the CUDA kernels need dense slots of float16 or bfloat16; use Triton";
  return nullptr;
}

inline const char* wrong_rows(const KvsLayout& layout, const KvsRows& rows) {
  if (rows.dtype != layout.dense_dtype) return "query and output must have the dtype of the cache for the CUDA kernels";
  if ((uintptr_t(rows.data) | 2 * uintptr_t(rows.token_stride) | 2 * uintptr_t(rows.head_stride)) % 4)
    return "rows of query and output must start at multiples of 4 bytes";
  return nullptr;
}

inline const char* wrong_arena(const KvsLayout& layout, const KvsArena& arena) {
  const uintptr_t places = uintptr_t(arena.base) | arena.block_stride | arena.head_stride | arena.strip_offset;
  return (places | layout.page_bytes | layout.kept_page_bytes) % 16 ? "pages must start at multiples of 16 bytes" : nullptr;
}

// The most warps, and then stages, that fit into `limit` bytes; what a launch asks for is not changed.
template <class Shape>
Block fitting_block(const KvsLayout& layout, const KvsLaunch& launch, int64_t limit) {
  for (int warps = MAX_WARPS; warps; warps /= 2)
    for (int stages = MAX_STAGES; stages > 1; --stages) {
      const bool asked = (!launch.warps || launch.warps == warps) &&
                         (launch.stages ? launch.stages == stages : stages < MAX_STAGES);
      const int64_t ring = stages * layout.page_bytes, merge = 4 * Shape::MERGE_FLOATS;
      const int64_t bytes = SHARE_BYTES + Shape::QUERY_BYTES + warps * (ring > merge ? ring : merge);
      if (asked && bytes <= limit) return {warps, stages, bytes};
    }
  return {0, 0, 0};
}

inline int64_t partial_rows(const KvsLayout& layout, int32_t num_reqs, int32_t splits) {
  return int64_t(num_reqs) * layout.num_kv_heads * splits * head_tiles(layout) * HEADS;
}

inline int64_t workspace_floats(const KvsLayout& layout, int32_t num_reqs, int32_t splits) {
  return partial_rows(layout, num_reqs, splits) * (layout.head_dim + 1);
}

template <class Number, int DIM, class Launcher>
const char* launch_bits(const DecodeArguments& arguments, const KvsLaunch& launch, Launcher& launcher) {
  const int bits = 10 * bits_of(key_codec(arguments.layout)) + bits_of(value_codec(arguments.layout));
  if (bits == 22) return launcher.template run<Shape<Number, DIM, 2, 2>>(arguments, launch);
  if (bits == 24) return launcher.template run<Shape<Number, DIM, 2, 4>>(arguments, launch);
  if (bits == 42) return launcher.template run<Shape<Number, DIM, 4, 2>>(arguments, launch);
  return launcher.template run<Shape<Number, DIM, 4, 4>>(arguments, launch);
}

template <class Number, class Launcher>
const char* launch_dim(const DecodeArguments& arguments, const KvsLaunch& launch, Launcher& launcher) {
  return arguments.layout.head_dim == 64 ? launch_bits<Number, 64>(arguments, launch, launcher)
                                         : launch_bits<Number, 128>(arguments, launch, launcher);
}

// kvs_cuda_decode, where Launcher::run<Shape>(arguments, launch) runs the two kernels.
template <class Launcher>
const char* decode(const KvsLayout& layout, const KvsBatch& batch, const KvsArena& arena, const float* staged,
                   const KvsRows& query, const KvsRows& output, float* lse, const KvsLaunch& launch,
                   Launcher& launcher) {
  for (const char* wrong : {unsupported(layout), wrong_rows(layout, query), wrong_rows(layout, output),
                            wrong_arena(layout, arena), launch.splits < 1 ? "splits must be at least 1" : nullptr})
    if (wrong) return wrong;
  if (batch.num_reqs == 0) return nullptr;
  float* const partial_lse = launch.workspace + partial_rows(layout, batch.num_reqs, launch.splits) * layout.head_dim;
  const DecodeArguments arguments{layout, batch, arena,            query,       output,
                                  staged, lse,   launch.workspace, partial_lse, launch.splits};
  return layout.dense_dtype == KVS_F16 ? launch_dim<Half>(arguments, launch, launcher)
                                       : launch_dim<Bfloat>(arguments, launch, launcher);
}

}  // namespace kvs::gpu
