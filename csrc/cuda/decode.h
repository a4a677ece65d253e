// Decode attention over pages of 2- and 4-bit codes: one block for (share of the sequence, 8 query heads of one KV
// head, request), its warps along the sequence. Every warp copies its own pages, several ahead, into its own ring in
// shared memory, so warps meet only once, to merge what they have.
#pragma once
#include "dense.h"
#include "values.h"

namespace kvs::gpu {

// What a launch is given; all pointers are the device's.
struct DecodeArguments {
  KvsLayout layout;
  KvsBatch batch;
  KvsArena arena;
  KvsRows query, output;
  const float* staged;
  float* lse;          // may be null
  float* partial;      // [num_reqs][num_kv_heads][splits][group, rounded up to HEADS][head_dim]
  float* partial_lse;  // the same without head_dim; base 2, -infinity where a split saw nothing
  int32_t splits, stages = 0;
};

template <class Number_, int DIM_, int KEY_BITS_, int VALUE_BITS_>
struct Shape {
  using Number = Number_;
  static constexpr int DIM = DIM_, KEY_BITS = KEY_BITS_, VALUE_BITS = VALUE_BITS_;
  static constexpr int QUERY_STRIDE = DIM + 16;  // spreads the rows over the banks
  static constexpr int QUERY_BYTES = HEADS * QUERY_STRIDE * 2;
  static constexpr int MERGE_FLOATS = HEADS * (DIM + 2);  // what a warp brings to the merge
};

KVS_BOTH inline int head_tiles(const KvsLayout& layout) {
  const int group = layout.num_heads / layout.num_kv_heads;
  return (group + HEADS - 1) / HEADS;
}

// The part of the work that a block does.
struct Share {
  Request request;
  int request_index, kv_head, head_tile, split;
  int heads = HEADS;  // of the tile that exist
  int oldest = 0;     // first token that the sliding window shows
  int first_kept = 0, kept_tokens = 0, kept_pages = 0;
  int first_tile = 0, first_page = 0, end_page = 0;  // of the kept pages and then the sealed tiles from first_tile on
};

constexpr int SHARE_BYTES = 128;
static_assert(sizeof(Share) <= SHARE_BYTES);

KVS_LANE Share share_of_block(const DecodeArguments& arguments, Place place) {
  const KvsLayout& layout = arguments.layout;
  const int tiles = head_tiles(layout), group = layout.num_heads / layout.num_kv_heads;
  Share share{request_of(arguments.batch, place.z), place.z, place.y, place.x % tiles, place.x / tiles};
  if (group - share.head_tile * HEADS < HEADS) share.heads = group - share.head_tile * HEADS;
  const Request& request = share.request;
  const int shown = layout.sliding_window ? request.num_computed + 1 - layout.sliding_window : 0;
  share.oldest = shown > 0 ? shown : 0;
  if (request.kept_end) {
    const KvsRun run = kept_of(arguments.arena, request.row, share.kv_head).runs[0];
    share.first_kept = run.first_page;
    share.kept_tokens = run.num_tokens;
    share.kept_pages = (run.num_tokens + layout.tile_tokens - 1) / layout.tile_tokens;
  }
  share.first_tile = (request.kept_end > share.oldest ? request.kept_end : share.oldest) / layout.tile_tokens;
  const int pages = share.kept_pages + request.num_computed / layout.tile_tokens - share.first_tile;
  const int each = (pages + arguments.splits - 1) / arguments.splits, first = share.split * each;
  share.first_page = first < pages ? first : pages;
  share.end_page = first + each < pages ? first + each : pages;
  return share;
}

KVS_LANE const uint8_t* page_at(const DecodeArguments& arguments, const Share& share, int page) {
  const Request& request = share.request;
  if (page < share.kept_pages)
    return kept_tile(arguments.layout, arguments.arena, request.kept_blocks, share.first_kept, page);
  const int tile = share.first_tile + page - share.kept_pages;
  return tile_page(arguments.layout, arguments.arena, request, share.kv_head, tile);
}

KVS_LANE Columns visible_columns(const DecodeArguments& arguments, const Share& share, int page) {
  const int tokens = arguments.layout.tile_tokens, sinks = arguments.layout.sink_tokens;
  if (page < share.kept_pages) {
    const int left = share.kept_tokens - page * tokens;
    return {0, left < tokens ? left : tokens};
  }
  const int start = (share.first_tile + page - share.kept_pages) * tokens;
  const int first = (sinks > share.oldest ? sinks : share.oldest) - start;
  return {first > 0 ? first : 0, tokens};
}

// Starts the copy of a page by the lanes of one warp, and closes a group in any case.
KVS_LANE void fetch_page(uint8_t* to, const DecodeArguments& arguments, const Share& share, int page, int lane) {
  if (page < share.end_page) {
    const uint8_t* from = page_at(arguments, share, page);
    const int size = int(arguments.layout.page_bytes), codes = int(scales_at(key_codec(arguments.layout)));
    for (int at = 16 * lane; at < size; at += 16 * 32) copy_async(to + (at < codes ? placed(at) : at), from + at);
  }
  close_copies();
}

// Eight query rows to shared memory, zeros where the group has no more heads.
template <class Shape>
KVS_LANE void load_query(uint16_t* rows, const DecodeArguments& arguments, const Share& share) {
  const int first = share.kv_head * (arguments.layout.num_heads / arguments.layout.num_kv_heads) +
                    share.head_tile * HEADS;
  for (int i = thread_in_block(); i < HEADS * Shape::DIM; i += threads_per_block()) {
    const int head = i / Shape::DIM, channel = i % Shape::DIM;
    uint16_t x = 0;
    if (head < share.heads)
      x = reinterpret_cast<const uint16_t*>(row_at(arguments.query, share.request.first_row, first + head))[channel];
    rows[head * Shape::QUERY_STRIDE + query_place(channel)] = x;
  }
}

// Attends to one page in shared memory.
template <class Shape>
KVS_LANE void add_page(State<Shape::DIM>& state, const Query& query, const KvsLayout& layout,
                       const uint8_t* page, Columns visible, float scale, int lane) {
  using Number = typename Shape::Number;
#pragma unroll 1
  for (int column = 0; column < layout.tile_tokens; column += CHUNK) {
    if (visible.end <= column || visible.first >= column + CHUNK) continue;
    float scores[TILES][4];
    key_scores<Number, Shape::DIM, Shape::KEY_BITS>(scores, query, layout, page, column, scale, lane);
#pragma unroll
    for (int n = 0; n < TILES; ++n)
      for (int i = 0; i < 4; ++i) {
        const int token = column + TILE * n + lane / 4 * 2 + i / 2;
        if (token < visible.first || token >= visible.end) scores[n][i] = NOTHING;
      }
    take_scores(state, scores);
    add_values<Number, Shape::DIM, Shape::VALUE_BITS>(state, scores, layout, page, column, visible, lane);
  }
}

// Attends to this warp's pages of the block's share: every `warps`-th.
template <class Shape>
KVS_LANE void add_pages(State<Shape::DIM>& state, const Query& query, const DecodeArguments& arguments,
                        const Share& share, uint8_t* ring, float scale, int warp, int warps, int lane) {
  const int size = int(arguments.layout.page_bytes), stages = arguments.stages;
  for (int stage = 0; stage < stages; ++stage)
    fetch_page(ring + stage * size, arguments, share, share.first_page + warp + stage * warps, lane);
  int stage = 0;
#pragma unroll 1
  for (int page = share.first_page + warp; page < share.end_page; page += warps) {
    await_copies(stages - 1);
    sync_warp();  // every lane's part of the page is there
    uint8_t* here = ring + stage * size;
    add_page<Shape>(state, query, arguments.layout, here, visible_columns(arguments, share, page), scale, lane);
    sync_warp();  // nobody reads it any more
    fetch_page(here, arguments, share, page + stages * warps, lane);
    stage = stage + 1 < stages ? stage + 1 : 0;
  }
  await_copies(0);
}

// Attends to this warp's part of the sinks and of the unfinished tile: every `warps`-th 16 tokens.
template <class Shape>
KVS_LANE void add_dense(State<Shape::DIM>& state, const Query& query, const DecodeArguments& arguments,
                        const Share& share, float scale, int warp, int warps, int lane) {
  const KvsLayout& layout = arguments.layout;
  const int computed = share.request.num_computed, tile_start = computed / layout.tile_tokens * layout.tile_tokens;
#pragma unroll 1
  for (int sinks = 0; sinks < 2; ++sinks) {
    const int start = sinks ? 0 : tile_start;
    const int end = !sinks ? computed + 1 : tile_start ? layout.sink_tokens : 0;
    const int first = share.oldest > start ? share.oldest : start;
    const DenseTokens tokens{layout, arguments.arena, share.request, arguments.staged, share.kv_head,
                             first, end, sinks != 0};
#pragma unroll 1
    for (int token = start + TILE * warp; token < end; token += TILE * warps)
      add_dense_tile<typename Shape::Number>(state, query, tokens, token, scale, lane);
  }
}

}  // namespace kvs::gpu
