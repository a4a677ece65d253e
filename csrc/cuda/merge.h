// Merging of partial softmaxes: of the warps of a block, then of the splits of a sequence.
#pragma once
#include "decode.h"

namespace kvs::gpu {

// One warp's numbers to shared memory: [HEADS] peaks, [HEADS] totals, [HEADS][DIM] outputs.
template <int DIM>
KVS_LANE void write_state(float* to, State<DIM>& state, int lane) {
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 2; ++i) {
    const float total = sum_over_g(state.total[i]);
    if (g == 0) to[2 * t + i] = state.peak[i], to[HEADS + 2 * t + i] = total;
  }
  float* output = to + 2 * HEADS;
#pragma unroll
  for (int u = 0; u < DIM / 32; ++u)
    for (int i = 0; i < 2; ++i) {
      const float offset = sum_over_g(state.offset[u][i]);
      for (int m = 2 * u; m < 2 * u + 2; ++m)
        for (int j = 0; j < 2; ++j)
          output[(2 * t + i) * DIM + TILE * m + 2 * g + j] = state.output[m][i + 2 * j] + offset;
    }
}

// Merges the warps' numbers into the block's partial output and LSE.
template <int DIM>
KVS_LANE void merge_warps(const float* from, const DecodeArguments& arguments, const Share& share, int warps) {
  constexpr int STEP = HEADS * (DIM + 2);
  const int64_t head_row = int64_t(share.request_index) * arguments.layout.num_kv_heads + share.kv_head;
  const int64_t row = (head_row * arguments.splits + share.split) * (head_tiles(arguments.layout) * HEADS) +
                      share.head_tile * HEADS;
  for (int i = thread_in_block(); i < HEADS * DIM; i += threads_per_block()) {
    const int head = i / DIM;
    float peak = NOTHING, total = 0.0f, output = 0.0f;
    for (int w = 0; w < warps; ++w) peak = max_of(peak, from[w * STEP + head]);
    const float least = peak == NOTHING ? 0.0f : peak;
    for (int w = 0; w < warps; ++w) {
      const float weight = exp2_of(from[w * STEP + head] - least);
      total += weight * from[w * STEP + HEADS + head];
      output += weight * from[w * STEP + 2 * HEADS + i];
    }
    const float divisor = total > 0.0f ? total : 1.0f;
    arguments.partial[row * DIM + i] = output / divisor;
    if (i % DIM == 0) arguments.partial_lse[row + head] = total > 0.0f ? peak + log2_of(total) : NOTHING;
  }
}

// The whole of one block. `shared`: its share, query rows, and the warps' rings, which the merge uses again.
template <class Shape>
KVS_LANE void decode_block(const DecodeArguments& arguments, uint8_t* shared) {
  const Place place = block_place();
  const int32_t* starts = arguments.batch.query_start_loc + place.z;
  if (starts[1] - starts[0] != 1) return;
  const int warp = thread_in_block() / 32, warps = threads_per_block() / 32, lane = thread_in_block() % 32;
  auto* const rows = reinterpret_cast<uint16_t*>(shared + SHARE_BYTES);
  uint8_t* const rings = shared + SHARE_BYTES + Shape::QUERY_BYTES;
  const Share own = share_of_block(arguments, place);
  load_query<Shape>(rows, arguments, own);
  auto* const shares = reinterpret_cast<Share*>(shared);  // not in registers, which are the scarcer
  if (thread_in_block() == 0) *shares = own;
  sync_block();
  const Share& share = *shares;
  const Query query{rows + lane / 4 * Shape::QUERY_STRIDE};
  State<Shape::DIM> state;
  clear(state);
  const float scale = arguments.layout.scale * 1.4426950408889634f;
  uint8_t* ring = rings + int64_t(warp) * arguments.stages * arguments.layout.page_bytes;
  add_pages<Shape>(state, query, arguments, share, ring, scale, warp, warps, lane);
  if (share.split == arguments.splits - 1) add_dense<Shape>(state, query, arguments, share, scale, warp, warps, lane);
  sync_block();
  float* merged = reinterpret_cast<float*>(rings);
  write_state(merged + warp * Shape::MERGE_FLOATS, state, lane);
  sync_block();
  merge_warps<Shape::DIM>(merged, arguments, share, warps);
}

// In place, times the Hadamard matrix of kvserve/pages/reference.py: lane i holds channels [i * PER, (i + 1) * PER).
template <int PER>
KVS_LANE void rotate(float (&x)[PER], int lane) {
  for (int step = 1; step < PER; step *= 2)
    for (int i = 0; i < PER; ++i)
      if (!(i & step)) {
        const float sum = x[i] + x[i + step], difference = x[i] - x[i + step];
        x[i] = sum, x[i + step] = difference;
      }
  for (int step = 1; step < 32; step *= 2)
    for (int i = 0; i < PER; ++i) {
      const float other = shuffle_xor(x[i], step);
      x[i] = lane & step ? other - x[i] : x[i] + other;
    }
  const float norm = PER == 2 ? 0.125f : 0.08838834764831845f;  // (32 * PER) ** -0.5
  for (int i = 0; i < PER; ++i) x[i] *= norm;
}

// One warp for one query head (x) of one request (z): merges the splits, turns rotated values back, writes the rows.
template <class Shape>
KVS_LANE void combine_block(const DecodeArguments& arguments) {
  constexpr int PER = Shape::DIM / 32;
  const KvsLayout& layout = arguments.layout;
  const Place place = block_place();
  const int head = place.x, group = layout.num_heads / layout.num_kv_heads, lane = thread_in_block();
  const int first_row = arguments.batch.query_start_loc[place.z];
  if (arguments.batch.query_start_loc[place.z + 1] - first_row != 1) return;
  const int step = head_tiles(layout) * HEADS;
  const int64_t row = (int64_t(place.z) * layout.num_kv_heads + head / group) * arguments.splits * step + head % group;
  float peak = NOTHING, total = 0.0f, output[PER] = {};
  for (int split = 0; split < arguments.splits; ++split)
    peak = max_of(peak, arguments.partial_lse[row + int64_t(split) * step]);
  for (int split = 0; split < arguments.splits; ++split) {
    const int64_t at = row + int64_t(split) * step;
    const float weight = exp2_of(arguments.partial_lse[at] - peak);
    total += weight;
    for (int i = 0; i < PER; ++i) output[i] += weight * arguments.partial[at * Shape::DIM + lane * PER + i];
  }
  for (int i = 0; i < PER; ++i) output[i] /= total;
  if (layout.value_rotated) rotate(output, lane);
  uint32_t* to = reinterpret_cast<uint32_t*>(row_at(arguments.output, first_row, head)) + lane * PER / 2;
  for (int i = 0; i < PER; i += 2) to[i / 2] = Shape::Number::pack(output[i], output[i + 1]);
  if (arguments.lse && lane == 0)
    arguments.lse[int64_t(first_row) * layout.num_heads + head] = (peak + log2_of(total)) * 0.6931471805599453f;
}

}  // namespace kvs::gpu
