// From the caller's tensors to the layouts that the micro-kernel reads, a block or a tile at a time, in words (see product.h).
//
//   rows     [token][stride]                       natural order, for the left side of a product
//   along    [token panel][word][NR]               B of a product that sums over columns (Q K^T, dO V^T)
//   across   [column panel][token word][NR]        B of a product that sums over tokens (P V, dS K, P^T dO, dS^T Q)
#pragma once
#include "attention.h"
#include "product.h"

// How the columns of a head are laid out.
template <class E>
struct Columns {
  int64_t count, words, stride, padded;  // columns; words of a row; words between rows, whole vectors; columns in whole panels
  explicit Columns(int64_t columns)
      : count(columns), words(ceil_div(columns, E::n)), stride(ceil_div(words, VL) * VL), padded(ceil_div(columns, NR) * NR) {}
  // Vectors of the panel that begins at column c.
  int vectors(int64_t c) const { return (int)std::min<int64_t>(NV, ceil_div(count - c, VL)); }
};

template <class T>
static const T* row_of(const View& x, int64_t token, int64_t head) {
  return (const T*)x.data + token * x.token + head * x.head;
}

// Lines that will be read (WRITE: and written) by and by.
template <bool WRITE = false>
static inline void prefetch(const void* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch((const char*)data + at, WRITE);
}

// One row; its words past its columns are 0.
template <class T, class E>
static inline void copy_row(const T* src, const Columns<E>& columns, float* to) {
  if constexpr (E::n == 1) {
    for (int64_t c = 0; c < columns.count; c++) to[c] = widen(src[c]);
    std::fill(to + columns.count, to + columns.stride, 0.f);
  } else {
    memcpy(to, src, columns.count * sizeof(T));
    memset((char*)to + columns.count * sizeof(T), 0, columns.stride * 4 - columns.count * sizeof(T));
  }
}

// Tokens [begin, end) of heads [head, head + heads), which are `apart` words from one another in `to`. Memory is read token by token: rows of
// one head are too far apart for the processor to fetch them ahead.
template <class T, class E>
static void copy_rows(const View& x, int64_t begin, int64_t end, int64_t head, int64_t heads, const Columns<E>& columns, float* to,
                      int64_t apart) {
  constexpr int64_t ahead = 8;
  int64_t bytes = columns.count * (int64_t)sizeof(T);
  for (int64_t t = begin; t < end; t++, to += columns.stride)
    for (int64_t h = 0; h < heads; h++) {
      prefetch(row_of<T>(x, std::min(t + ahead, end - 1), head + h), bytes);
      copy_row<T, E>(row_of<T>(x, t, head + h), columns, to + h * apart);
    }
}

// Of a block's rows, those of tokens [begin, end) and up to whole vectors.
template <class E>
static void pack_along(const float* rows, const Columns<E>& columns, int begin, int end, float* to) {
  for (int t = begin / VL * VL; t < end; t += VL)
    for (int64_t w = 0; w < columns.stride; w += VL) {
      vf square[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; i++) square[i] = load(rows + (t + i) * columns.stride + w);
      transpose(square);
      float* dst = to + t / NR * NR * columns.stride + w * NR + t % NR;
#pragma GCC unroll 16
      for (int i = 0; i < VL; i++) store(dst + i * NR, square[i]);
    }
}

// Of a block of `tokens`, those that hold [begin, end).
template <class E>
static void pack_across(const float* rows, const Columns<E>& columns, int tokens, int begin, int end, float* to) {
  int64_t words = tokens / E::n;
  auto at = [&](int64_t column, int64_t word) { return to + column / NR * NR * words + word * NR + column % NR; };
  for (int64_t t = begin / E::n; t < ceil_div(end, E::n); t++)
    for (int64_t w = 0; w < columns.stride; w += VL) {
      const float* src = rows + t * E::n * columns.stride + w;
      if constexpr (E::n == 1) {
        store(at(w, t), load(src));
      } else {
        vf even = load(src), odd = load(src + columns.stride);
        store(at(2 * w, t), interleave_halves<false>(even, odd));
        if (2 * w + VL < columns.count) store(at(2 * w + VL, t), interleave_halves<true>(even, odd));
      }
    }
}
