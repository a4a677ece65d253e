// C interface of the kvserve CPU kernels. No libtorch: plain pointers, byte strides and the structs below.
// kvserve/attention/structs.py mirrors every struct with ctypes; keep both in the same order.
//
// One step of one layer is four calls, in this order (T = tile_tokens):
//   kvs_stage        new K/V rows -> `staged`, float32, rounded to the dense dtype, V rotated where the policy rotates
//   kvs_store_sealed seal every tile completed by this step (dense policy: write all new tokens to their slots)
//   kvs_attend       attention of the new queries over sealed pages, dense tail and staged rows
//   kvs_store_tail   write the new tokens of the unfinished tile to the tail slots (dense policy: nothing), and those of
//                    the tile that is unfinished again if drafts are rejected
// The tail is written last because attention and sealing still read the previous tile's tokens from it.
//
// What a query at position p sees: every token t <= p (and t > p - sliding_window, if set), where
//   t <  tile_start(p), t >= sink_tokens : the sealed page          tile_start(p) = p / T * T
//   t <  tile_start(p), t <  sink_tokens : the dense slot in the sink blocks
//   t >= tile_start(p)                   : the dense row (tail slot if older than this step, else `staged`)
// It depends on positions only, so chunking, prefix hits and recompute cannot change the result.
//
// A request may have been evicted at kept_end, a multiple of T: of the tokens sink_tokens <= t < kept_end each layer and
// KV head keeps its own subset, re-packed into kept pages: runs of one format each (kvserve/pages/kept.py), in ascending
// order within a run. A query at p >= kept_end (no other occurs) then sees, of the tokens before kept_end, the sinks and
// what its KV head kept; all others as above. Where pages have log-masses, that of a kept token is added to its logit: the
// log of how many tokens it stands for. Those of sealed tiles are 0.
//
// A logit s = scale * q . k counts as soft_cap * tanh(s / soft_cap) where the layer caps logits (Gemma 2, arXiv
// 2408.00118, section 2), before log-masses and masks. A learned sink (gpt-oss, arXiv 2508.10925, section 2.2) is one
// more logit of a query head, neither scaled nor capped: it has a share of the softmax, thus of the LSE, and no value.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)  // the rest of the library is compiled hidden
extern "C" {

enum KvsDtype : int32_t { KVS_F32 = 0, KVS_F16 = 1, KVS_BF16 = 2 };

// Kinds of codecs, as the classes of kvserve/codecs/ number them.
enum KvsKind : int32_t {
  KVS_AFFINE = 1,
  KVS_SYMMETRIC = 2,
  KVS_TABLE = 3,
  KVS_VECTOR = 4,
  KVS_OUTLIERS = 5,
  KVS_LOW_RANK = 6,
  KVS_BEFORE_ROPE = 7,
};

// One codec of a chain. `params` and the offsets `at` of its own sections in a page have the order in which its class
// gives them (csrc/codecs/fields.h names them).
struct KvsCodec {
  int32_t kind;  // KvsKind
  int32_t params[8];
  int64_t at[6];
  const void* tables[2];     // float32, of the layer's first KV head
  int64_t table_strides[2];  // bytes from one KV head's table to the next; 0: all heads share one
};

// How the keys or the values of a tile are written: a chain of codecs, the outermost first. The last one writes codes,
// each one before it adds to what the next one decodes to. stages 0: dense slots.
struct KvsHalf {
  int32_t stages;
  KvsCodec stage[4];
};

// Geometry of the pool (kvserve/pages/layout.py) and of the attention layer.
struct KvsLayout {
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t block_size;       // tokens of one block
  int32_t dense_dtype;      // KvsDtype of dense slots
  int32_t sliding_window;   // 0: none
  float scale;              // softmax scale
  float soft_cap;           // of logits; 0: none
  const float* sink_logits; // float32 [num_heads], the learned sinks; null: none
  int32_t tile_tokens;      // 0: dense policy, and every field below it is 0
  int32_t tiles_per_block, slots_per_cell, state_blocks, tail_blocks;
  int32_t tail_slots;       // the token at position p of an unfinished tile has slot p % tail_slots
  int32_t draft_tokens;     // of a step, at its end, that may be rejected after it
  int32_t sink_blocks, sink_tokens;
  int32_t value_rotated;    // V is turned by the Hadamard matrix before it is staged, and answers are turned back
  int64_t page_bytes;       // of a tile
  KvsHalf key, value;       // both without stages: a page is tile_tokens dense slots
  int64_t mass;             // offset in a coded page of its log-masses, float32 [tile_tokens]; 0: it has none
  int64_t kept_page_bytes;  // of a kept page, which holds `tiles_per_page` tiles back to back
  int32_t tiles_per_page;
  int32_t num_formats;      // of kept tiles: this one is format 0, format f is others[f - 1]
  const struct KvsLayout* others;  // each the same but for page_bytes, key, value, mass, tiles_per_page and formats
};

// One layer's view of the arena: its cell of (block b, kv head h) starts at base + b * block_stride + h * head_stride. That
// is `strip_offset` bytes behind the start of the strip of (b, h): the cells of all layers, which hold `pages_per_strip`
// kept pages. Every layer has the same KV heads.
struct KvsArena {
  uint8_t* base;
  int64_t block_stride, head_stride, strip_offset;  // bytes
  int32_t pages_per_strip;
};

// Tokens of one (layer, KV head) in consecutive kept pages of one format; the last tile may be partly filled.
struct KvsRun {
  int32_t format, first_page, num_tokens;
};

// What one (layer, KV head) of an evicted request keeps; stored at byte 0 of the layer's cell (row[0], kv_head).
struct KvsKept {
  int32_t end;  // kept_end of its request
  int32_t num_runs;
  KvsRun runs[4];
};

// num_reqs requests; request r has the query rows [query_start_loc[r], query_start_loc[r + 1]) and, with them,
// seq_lens[r] tokens. Its blocks are block_table[r * block_table_stride ...].
struct KvsBatch {
  int32_t num_reqs;
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* block_table;
  int64_t block_table_stride;  // elements
  const int32_t* kept_ends;    // [num_reqs] kept_end; 0: not evicted. Null: nobody is, and the next two mean nothing
  const int32_t* kept_starts;  // [num_reqs + 1] request r has kept_blocks[kept_starts[r] .. kept_starts[r + 1]]
  const int32_t* kept_blocks;  // block ids
};

// [tokens, heads, head_dim] rows; the last dim is contiguous.
struct KvsRows {
  void* data;
  int64_t token_stride, head_stride;  // elements
  int32_t dtype;                      // KvsDtype
};

// Where to add up the attention that tokens receive from the requests of a batch that have one query row.
// sums[r]: float32 [num_kv_heads][columns[r]], added to; null: not wanted of request r. Columns as of
// kvs_attention_sums; each query head of the group adds probability ** power (1 or 2), a learned sink's share being
// nobody's. Not for a sliding window.
struct KvsReceived {
  int32_t power;
  float* const* sums;
  const int64_t* columns;
};

// staged: float32 [num_tokens][num_kv_heads][K row, V row][head_dim]. beyond: grows by the rows with a number that
// float16 has no room for, where the layout keeps scales or slots in it (`beyond_range` in kvserve/pages/reference.py).
void kvs_stage(const KvsLayout*, const KvsRows* key, const KvsRows* value, int32_t num_tokens, float* staged,
               int64_t* beyond);
void kvs_store_sealed(const KvsLayout*, const KvsBatch*, const KvsArena*, const float* staged);
// lse: float32 [num_tokens][num_heads], natural log of the softmax denominator; it and `received` may be null.
void kvs_attend(const KvsLayout*, const KvsBatch*, const KvsArena*, const float* staged, const KvsRows* query,
                const KvsRows* out, float* lse, const KvsReceived* received);
void kvs_store_tail(const KvsLayout*, const KvsBatch*, const KvsArena*, const float* staged);
// The four in order.
void kvs_forward(const KvsLayout*, const KvsBatch*, const KvsArena*, const KvsRows* key, const KvsRows* value,
                 int32_t num_tokens, float* staged, int64_t* beyond, const KvsRows* query, const KvsRows* out,
                 float* lse, const KvsReceived* received);

// K and V of the stored tokens [first, last) of one request, of which `num_tokens` are stored, float32
// [num_kv_heads][last - first][head_dim]; V is un-rotated; a null value is left out. Of an evicted request, only sinks
// and tokens from kept_end on are there to be read.
void kvs_read(const KvsLayout*, const KvsArena*, const int32_t* row, int32_t num_tokens, int32_t first, int32_t last,
              float* key, float* value);
// What each KV head of this layer keeps. `kept`: its headers, [num_kv_heads]. The tokens of head h, run by run, are the
// rows [offsets[h], offsets[h + 1]) of key and value, float32 [total][head_dim], V un-rotated, and of log_mass, float32
// [total]; it is not written where pages have none.
void kvs_read_kept(const KvsLayout*, const KvsArena*, const int32_t* kept_blocks, const KvsKept* kept,
                   const int64_t* offsets, float* key, float* value, float* log_mass);
// The reverse; stores the headers too, in state_block. log_mass null: 0 for every token.
void kvs_write_kept(const KvsLayout*, const KvsArena*, int32_t state_block, const int32_t* kept_blocks,
                    const KvsKept* kept, const int64_t* offsets, const float* key, const float* value,
                    const float* log_mass);
// The attention that the last `num_queries` of a request's `num_tokens` stored tokens pay to each token it holds: over
// the query rows, the sum (maximum: the largest) of probability ** power (1 or 2), for every query head. Keys count as
// they are stored now; a query sees the tokens up to its own. sums: float32 [num_heads][columns], written; of a KV head
// the columns are all tokens, or, for an evicted request, sinks, kept tokens and those from kept_end on, where every
// query must stand; columns behind its tokens are zero. Not for a sliding window.
void kvs_attention_sums(const KvsLayout*, const KvsArena*, const int32_t* row, int32_t kept_end,
                        const int32_t* kept_blocks, int32_t num_tokens, const KvsRows* query, int32_t num_queries,
                        int32_t power, int32_t maximum, float* sums, int64_t columns);
// Instruction set this library was compiled for: "portable", "avx2", "avx512".
const char* kvs_isa(void);
int32_t kvs_num_threads(void);
// sizeof(KvsLayout): what mirrors it with another size was written for other sources.
int64_t kvs_layout_bytes(void);
}
#pragma GCC visibility pop
