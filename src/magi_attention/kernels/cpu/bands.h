// Which cells of a tile of queries and a block of keys a band attends.
#pragma once
#include "attention.h"
#include "simd.h"

static_assert(TILE_Q % MR == 0 && TILE_Q % 2 == 0 && MR % 2 == 0 && BLOCK_K % NR == 0);

// What a strip of at most MR queries attends of one block of keys: columns [begin, end), counted from the block's beginning.
struct Strip {
  int64_t row;
  int rows, begin, end;
  int first() const { return begin / VL * VL; }
  int last() const { return (end + VL - 1) / VL * VL; }
};

// A band cut to queries [a, b) of a tile and keys [kb, kb + BLOCK_K).
struct BandBlock {
  const Band& band;
  int64_t a, b, kb;
  int left(int64_t r) const { return (int)(std::max({band.k0, r + band.lo, kb}) - kb); }
  int right(int64_t r) const { return (int)(std::min({band.k1, r + band.hi + 1, kb + BLOCK_K}) - kb); }

  // Its strips that attend something, which are neighbours; returns their number. All but the first begin at an even row.
  int strips(Strip* to) const {
    int count = 0;
    for (int64_t i = a; i < b;) {
      int rows = (int)std::min<int64_t>(MR - i % 2, b - i), begin = left(i), end = right(i + rows - 1);
      if (begin < end) to[count++] = {i, rows, begin, end};
      i += rows;
    }
    return count;
  }
};

constexpr int MAX_STRIPS = TILE_Q / MR + 1;

// For each panel of columns in turn, which stays in the first-level cache, the strips that attend some of it: act(column, vectors, strip).
template <class Act>
static inline void each_panel(const Strip* strips, int count, Act&& act) {
  int first = BLOCK_K, last = 0;
  for (int i = 0; i < count; i++) first = std::min(first, strips[i].first()), last = std::max(last, strips[i].last());
  for (int panel = first / NR * NR; panel < last; panel += NR)
    for (int i = 0; i < count; i++) {
      int begin = std::max(panel, strips[i].first()), end = std::min(panel + NR, strips[i].last());
      if (begin < end) act(begin, (end - begin) / VL, strips[i]);
    }
}

// The bands that meet each tile of `tile` rows: those of tile t are list[first[t] .. first[t + 1]).
struct TileBands {
  std::vector<int64_t> first, list;
  TileBands(const Problem& p, bool by_query, int64_t tile) {
    int64_t tiles = ceil_div(by_query ? p.num_q : p.num_k, tile);
    first.assign(tiles + 1, 0);
    auto each = [&](auto&& act) {
      for (int64_t b = 0; b < p.num_bands; b++) {
        const Band& x = p.bands[b];
        int64_t begin = by_query ? x.q0 : x.k0, end = by_query ? x.q1 : x.k1;
        for (int64_t t = begin / tile; t * tile < end; t++) act(t, b);
      }
    };
    each([&](int64_t t, int64_t) { first[t + 1]++; });
    for (int64_t t = 0; t < tiles; t++) first[t + 1] += first[t];
    list.resize(first[tiles]);
    std::vector<int64_t> at(first.begin(), first.end() - 1);
    each([&](int64_t t, int64_t b) { list[at[t]++] = b; });
  }
};
