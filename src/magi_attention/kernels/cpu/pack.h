// From the caller's tensors to the layouts that the micro-kernel reads: all float, heads apart, zero-padded to whole panels.
//
//   rows     [head][token][columns]              natural order, for the left side of a product
//   across   [head][column panel][token][NR]     B of a product that sums over tokens (P V, dS K, P^T dO, dS^T Q)
//   along    [head][token panel][column][NR]     B of a product that sums over columns (Q K^T, dO V^T)
#pragma once
#include <type_traits>

#include "attention.h"
#include "elements.h"
#include "simd.h"

struct Packed {
  int64_t tokens, columns, heads, head_size;
  Buffer data;
  Packed(int64_t tokens_, int64_t columns_, int64_t heads_)
      : tokens(tokens_), columns(columns_), heads(heads_), head_size(tokens_ * columns_), data(heads_ * tokens_ * columns_) {}
  float* head(int64_t h) const { return data + h * head_size; }
};

template <class T>
static const T* row_of(const View& x, int64_t token, int64_t head) {
  return (const T*)x.data + token * x.token + head * x.head;
}

template <class T>
static void pack_rows(const View& x, int64_t tokens, int64_t columns, float factor, const Packed& to, int threads) {
  constexpr int64_t block = 256;
  int64_t blocks = ceil_div(to.tokens, block);
  parallel(to.heads * blocks, threads, [&](int64_t task, int) {
    int64_t h = task / blocks, begin = task % blocks * block, end = std::min(begin + block, to.tokens);
    for (int64_t t = begin; t < end; t++) {
      float* dst = to.head(h) + t * to.columns;
      int64_t used = t < tokens ? columns : 0;
      const T* src = row_of<T>(x, t < tokens ? t : 0, h);
      for (int64_t c = 0; c < used; c++) dst[c] = widen(src[c]) * factor;
      for (int64_t c = used; c < to.columns; c++) dst[c] = 0;
    }
  });
}

// The left side of a product: rows of floats with a stride. The caller's own where they are floats, else a widened copy.
struct Rows {
  std::unique_ptr<Packed> copy;
  const float* data;
  int64_t token, head;
  const float* at(int64_t row, int64_t h) const { return data + h * head + row * token; }
};

template <class T>
static Rows make_rows(const View& x, int64_t tokens, int64_t columns, int64_t heads, int threads) {
  if constexpr (std::is_same_v<T, float>) return {nullptr, (const float*)x.data, x.token, x.head};
  auto copy = std::make_unique<Packed>(tokens, columns, heads);
  pack_rows<T>(x, tokens, columns, 1.f, *copy, threads);
  const float* data = copy->data;
  int64_t head = copy->head_size;
  return {std::move(copy), data, columns, head};
}

template <class T>
static void pack_across(const View& x, int64_t tokens, int64_t columns, float factor, const Packed& to, int threads) {
  constexpr int64_t block = 256;
  int64_t blocks = ceil_div(to.tokens, block);
  parallel(to.heads * blocks, threads, [&](int64_t task, int) {
    int64_t h = task / blocks, begin = task % blocks * block, end = std::min(begin + block, to.tokens);
    for (int64_t t = begin; t < end; t++) {
      const T* src = row_of<T>(x, t < tokens ? t : 0, h);
      int64_t used = t < tokens ? columns : 0;
      for (int64_t c = 0; c < to.columns; c += NR) {
        float* dst = to.head(h) + c * to.tokens + t * NR;
        for (int64_t e = 0; e < NR; e++) dst[e] = c + e < used ? widen(src[c + e]) * factor : 0.f;
      }
    }
  });
}

template <class T>
static void pack_along(const View& x, int64_t tokens, int64_t columns, float factor, const Packed& to, int threads) {
  int64_t panels = to.tokens / NR;
  parallel(to.heads * panels, threads, [&](int64_t task, int) {
    int64_t h = task / panels, begin = task % panels * NR;
    float* dst = to.head(h) + begin * to.columns;
    for (int64_t e = 0; e < NR; e++) {
      bool used = begin + e < tokens;
      const T* src = row_of<T>(x, used ? begin + e : 0, h);
      for (int64_t c = 0; c < to.columns; c++) dst[c * NR + e] = used && c < columns ? widen(src[c]) * factor : 0.f;
    }
  });
}

static_assert(TILE_Q % MR == 0 && BLOCK_K % NR == 0);

// What a strip of at most MR queries attends of one block of keys: columns [begin, end), counted from the block's beginning.
struct Strip {
  int64_t row;
  int rows, begin, end;
  int first() const { return begin / NR * NR; }
  int last() const { return (end + NR - 1) / NR * NR; }
};

// A band cut to queries [a, b) and keys [kb, kb + BLOCK_K).
struct BandBlock {
  const Band& band;
  int64_t a, b, kb;
  int left(int64_t r) const { return (int)(std::max({band.k0, r + band.lo, kb}) - kb); }
  int right(int64_t r) const { return (int)(std::min({band.k1, r + band.hi + 1, kb + BLOCK_K}) - kb); }

  // Its strips that attend something; returns their number.
  int strips(Strip* to) const {
    int count = 0;
    for (int64_t i = a; i < b; i += MR) {
      int rows = (int)std::min<int64_t>(MR, b - i), begin = left(i), end = right(i + rows - 1);
      if (begin < end) to[count++] = {i, rows, begin, end};
    }
    return count;
  }
};

// For each panel of columns in turn, which stays in the first-level cache, the strips that attend some of it.
template <class Act>
static inline void each_panel(const Strip* strips, int count, Act&& act) {
  int first = BLOCK_K, last = 0;
  for (int i = 0; i < count; i++) first = std::min(first, strips[i].first()), last = std::max(last, strips[i].last());
  for (int c = first; c < last; c += NR)
    for (int i = 0; i < count; i++)
      if (strips[i].first() <= c && c < strips[i].last()) act(c, strips[i]);
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
