// Addresses of pages and dense slots (kvserve/pages/layout.py). `row` is a request's row of the block table.
#pragma once
#include <cstring>

#include "codecs/fields.h"

namespace kvs {

KVS_BOTH inline int64_t dense_bytes(const KvsLayout& l) { return l.dense_dtype == KVS_F32 ? 4 : 2; }
KVS_BOTH inline int64_t slot_bytes(const KvsLayout& l) { return 2 * l.head_dim * dense_bytes(l); }

KVS_BOTH inline uint8_t* cell(const KvsArena& a, int32_t block, int32_t kv_head) {
  return a.base + block * a.block_stride + kv_head * a.head_stride;
}

// One request of a batch.
struct Request {
  int32_t first_row;     // of its query rows
  int32_t num_computed;  // tokens stored before this step
  int32_t seq_len;
  const int32_t* row;
  int32_t kept_end = 0;  // 0: not evicted
  const int32_t* kept_blocks = nullptr;
};

KVS_BOTH inline Request request_of(const KvsBatch& b, int32_t r) {
  const int32_t first = b.query_start_loc[r], len = b.query_start_loc[r + 1] - first;
  Request q{first, b.seq_lens[r] - len, b.seq_lens[r], b.block_table + r * b.block_table_stride};
  if (b.kept_ends && b.kept_ends[r]) {
    q.kept_end = b.kept_ends[r];
    q.kept_blocks = b.kept_blocks + b.kept_starts[r];
  }
  return q;
}

// Sealed page of tile i.
KVS_BOTH inline uint8_t* tile_page(const KvsLayout& l, const KvsArena& a, const Request& q, int32_t kv_head, int32_t i) {
  const int32_t j = i / l.tiles_per_block;
  const int32_t r = l.state_blocks + l.tail_blocks + j + (j ? l.sink_blocks : 0);
  return cell(a, q.row[r], kv_head) + (i % l.tiles_per_block) * l.page_bytes;
}
// Kept page f of a request: its pages fill the strips of each kept block, head by head, whichever head they belong to.
KVS_BOTH inline uint8_t* kept_page(const KvsLayout& l, const KvsArena& a, const int32_t* kept_blocks, int32_t f) {
  const int32_t of_block = l.num_kv_heads * a.pages_per_strip, strip = f % of_block / a.pages_per_strip;
  return cell(a, kept_blocks[f / of_block], strip) - a.strip_offset + (f % a.pages_per_strip) * l.kept_page_bytes;
}
// The layout of kept tiles of a format.
KVS_BOTH inline const KvsLayout& layout_of(const KvsLayout& l, int32_t format) {
  return format ? l.others[format - 1] : l;
}
// Tile i of the run that begins with page `first`; `l` is the layout of its format.
KVS_BOTH inline uint8_t* kept_tile(const KvsLayout& l, const KvsArena& a, const int32_t* kept_blocks, int32_t first,
                                   int32_t i) {
  return kept_page(l, a, kept_blocks, first + i / l.tiles_per_page) + (i % l.tiles_per_page) * l.page_bytes;
}
// What one KV head of an evicted request keeps in this layer.
KVS_BOTH inline KvsKept kept_of(const KvsArena& a, const int32_t* row, int32_t kv_head) {
  KvsKept kept;
  memcpy(&kept, cell(a, row[0], kv_head), sizeof kept);
  return kept;
}
// Dense slot of sink token s.
KVS_BOTH inline uint8_t* sink_slot(const KvsLayout& l, const KvsArena& a, const int32_t* row, int32_t kv_head, int32_t s) {
  const int32_t block = row[l.state_blocks + l.tail_blocks + 1 + s / l.slots_per_cell];
  return cell(a, block, kv_head) + (s % l.slots_per_cell) * slot_bytes(l);
}
// Dense slot of the unfinished tile's token at position p.
KVS_BOTH inline uint8_t* tail_slot(const KvsLayout& l, const KvsArena& a, const int32_t* row, int32_t kv_head, int32_t p) {
  const int32_t s = p % l.tail_slots;
  return cell(a, row[l.state_blocks + s / l.slots_per_cell], kv_head) + (s % l.slots_per_cell) * slot_bytes(l);
}
// Slot of the token at position p under the dense policy.
KVS_BOTH inline uint8_t* dense_slot(const KvsLayout& l, const KvsArena& a, const int32_t* row, int32_t kv_head, int32_t p) {
  return cell(a, row[p / l.block_size], kv_head) + (p % l.block_size) * slot_bytes(l);
}
// Whether every token is a dense slot: the dense policy, or dense pages.
KVS_BOTH inline bool all_dense(const KvsLayout& l) { return l.key.stages == 0; }
// Slot of the token at position p, which is stored and not evicted, where every token is a dense slot.
KVS_BOTH inline uint8_t* stored_slot(const KvsLayout& l, const KvsArena& a, const Request& q, int32_t kv_head, int32_t p) {
  if (!l.tile_tokens) return dense_slot(l, a, q.row, kv_head, p);
  if (p >= q.num_computed / l.tile_tokens * l.tile_tokens) return tail_slot(l, a, q.row, kv_head, p);
  return tile_page(l, a, q, kv_head, p / l.tile_tokens) + p % l.tile_tokens * slot_bytes(l);
}
// Slot of the i-th token kept in dense pages from page `first` on.
KVS_BOTH inline uint8_t* kept_slot(const KvsLayout& l, const KvsArena& a, const Request& q, int32_t first, int32_t i) {
  return kept_tile(l, a, q.kept_blocks, first, i / l.tile_tokens) + i % l.tile_tokens * slot_bytes(l);
}
// Log-masses of a page's tokens, where pages have them.
KVS_BOTH inline const float* masses_of(const KvsLayout& l, const uint8_t* page) { return (const float*)(page + l.mass); }
// Staged K row of a new token; its V row follows.
KVS_BOTH inline const float* staged_row(const KvsLayout& l, const float* staged, int64_t token, int32_t kv_head) {
  return staged + (token * l.num_kv_heads + kv_head) * 2 * l.head_dim;
}

// Address of one row of a [tokens, heads, head_dim] tensor.
KVS_BOTH inline uint8_t* row_at(const KvsRows& rows, int64_t token, int64_t head) {
  const int64_t bytes = rows.dtype == KVS_F32 ? 4 : 2;
  return (uint8_t*)rows.data + (token * rows.token_stride + head * rows.head_stride) * bytes;
}

}  // namespace kvs
