// Sealed pages that are attended to together, and the buffers this takes.
#pragma once
#include <vector>

#include "softmax.h"

namespace kvs {

constexpr int MAX_PAGES = 4;     // of a batch
constexpr int MAX_GROUPS = 8;    // of a page: 256 channels / 32
constexpr int MAX_FACTORS = 4 * (256 + 128);  // of a page and head: groups of tokens * (channels + boosted ones)

// Panels of the pages of a batch (codecs/tile.h), where a half is not read in integers. Heads are processed MAX_HEADS at a
// time: where there are more, every page has panels of its own, and the first heads decode them for all.
struct DecodedPages {
  std::vector<float> panels;
  int64_t page_floats = 0;
  bool each_page = false, done = false;

  void reserve(int64_t floats, bool of_each_page) {
    each_page = of_each_page;
    page_floats = floats;
    panels.resize(floats * (each_page ? MAX_PAGES : 1));
  }
  float* of_page(int i) { return panels.data() + (each_page ? i * page_floats : 0); }
};

// Per-thread buffers for MAX_PAGES pages and H <= MAX_HEADS heads.
struct PageScratch {
  alignas(64) float scores[MAX_HEADS * MAX_TOKENS];
  alignas(64) float x[MAX_HEADS * MAX_SEALED_DIM];
  alignas(64) float boost_x[MAX_HEADS * MAX_SEALED_DIM];
  alignas(64) int16_t factors[MAX_PAGES * MAX_HEADS * MAX_FACTORS];  // [page][group][head][row]
  float unit[MAX_PAGES * MAX_GROUPS], low_dot[MAX_PAGES * MAX_GROUPS][MAX_HEADS];
  DecodedPages keys, values;
};

// Pages of one KV head read together, each `tile_tokens` columns of the scores, and those that are read after them (may
// be null).
struct Pages {
  const uint8_t* pages[MAX_PAGES];
  const uint8_t* next[MAX_PAGES];
  int64_t page_bytes;
  int32_t kv_head, first_position;  // of the first page's first token
  int count = 0;

  // A quarter of the page that follows page i: all of it at once would fill the miss buffers and stall the loads.
  void prefetch_quarter(int i, int quarter) const {
    if (!next[i]) return;
    const int64_t begin = page_bytes * quarter / 4 / 64 * 64, end = page_bytes * (quarter + 1) / 4 / 64 * 64;
    prefetch(next[i] + begin, end - begin);
  }
};

}  // namespace kvs
