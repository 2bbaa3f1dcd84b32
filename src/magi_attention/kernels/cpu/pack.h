// From the caller's tensors to the layouts that the micro-kernel reads, a block or a tile at a time, in words (see product.h).
//
//   rows     [token][stride]                       natural order, for the left side of a product
//   along    [token panel][word][panel's width]    B of a product that sums over columns (Q K^T, dO V^T)
//   across   [column panel][token word][NR]        B of a product that sums over tokens (P V, dS K, P^T dO, dS^T Q); where a word is one
//                                                  element, rows are that already
#pragma once
#include "attention.h"
#include "product.h"

// How the columns of a head are laid out.
template <class E>
struct Columns {
  int64_t count, words, stride, padded;  // columns; words of a row; words between rows, whole vectors; columns in whole panels
  explicit Columns(int64_t columns)
      : count(columns), words(ceil_div(columns, E::n)), stride(ceil_div(words, VL) * VL), padded(ceil_div(columns, NR) * NR) {}
  // Words of `tokens` rows packed across.
  int64_t across(int tokens) const { return E::n == 1 ? 0 : tokens / E::n * padded; }
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

// Whether the words of a row of T are what is multiplied.
template <class T, class E>
constexpr bool are_words = sizeof(T) * E::n == sizeof(float);

// Looks at words that are copied anyway: whether all elements are finite. Sums of 0 times each are 0, or else NaN.
template <class E>
class Scan {
 public:
  // `chain`: 0 to 3. A sum's next term waits for the one before, so there are four.
  void see(int chain, vf words) { sums[chain] = E::madd(words, vf{}, sums[chain]); }
  void see_all(const float* words, int64_t count) {  // whole vectors
    Scan own = *this;  // in registers
    int64_t i = 0;
    for (; i + 4 * VL <= count; i += 4 * VL)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) own.see(j, load(words + i + j * VL));
    for (; i < count; i += VL) own.see(0, load(words + i));
    *this = own;
  }
  bool all_finite() const {
    vf sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return !any(sum != 0.f);  // NaN is not 0
  }

 private:
  vf sums[4] = {};
};
struct NoScan {
  void see(int, vf) {}
};

// One row; its words past its columns are 0. Those that are only moved are seen.
template <class T, class E, class Seen>
static inline void copy_row(const T* __restrict src, const Columns<E>& columns, float* __restrict to, Seen& seen) {
  auto put = [&](int64_t word, int chain, vf x) {
    store(to + word, x);
    seen.see(chain, x);
  };
  if constexpr (are_words<T, E>) {
    int64_t word = 0, words = columns.count / E::n;
    auto from = [&](int64_t at) { return load_bytes((const char*)(src + at * E::n)); };  // not the whole row by memcpy: it is short, for a call
    for (; word + 4 * VL <= words; word += 4 * VL)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) put(word + i * VL, i, from(word + i * VL));
    for (; word + VL <= words; word += VL) put(word, 0, from(word));
    if (word == columns.stride) return;
    vf last{};
    memcpy(&last, src + word * E::n, (columns.count - word * E::n) * sizeof(T));
    put(word, 0, last);
  } else {
    for (int64_t c = 0; c < columns.count; c++) to[c] = widen(src[c]);
    std::fill(to + columns.count, to + columns.stride, 0.f);
  }
}
template <class T, class E>
static inline void copy_row(const T* __restrict src, const Columns<E>& columns, float* __restrict to) {
  NoScan none;
  copy_row<T, E>(src, columns, to, none);
}

// Rows (token, head) of a tensor, one after the other: from the head `skipped` of a token on, of the `group` heads that begin at `head`.
template <class T>
class Rows {
 public:
  Rows(const View& x, int64_t token, int64_t head, int group, int skipped, int64_t count)
      : x(x), head(head), token(token), left(count), group(group), h(skipped) {}
  bool any() const { return left > 0; }
  const T* next() {
    const T* row = row_of<T>(x, token, head + h);
    if (++h == group) h = 0, token++;
    left--;
    return row;
  }
  void skip(int64_t rows) {
    token += (h + rows) / group, h = (int)((h + rows) % group), left -= rows;
  }

 private:
  const View& x;
  int64_t head, token, left;
  int group, h;
};

template <class T>
static __attribute__((noinline)) void fetch_any(Rows<T>& rows, int count, int64_t columns) {
  for (; count > 0 && rows.any(); count--) prefetch(rows.next(), columns * (int64_t)sizeof(T));
}

// Rows that will be read by and by, brought nearer a few at a time, between products that do not wait for memory.
template <class T>
static inline void fetch(Rows<T>& rows, int count, int64_t columns) {
  if (rows.any()) fetch_any(rows, count, columns);
}

template <class T, class E>
static __attribute__((noinline)) void copy_rows(Rows<T> rows, const Columns<E>& columns, float* to) {
  constexpr int apart = 8;
  Rows<T> later = rows;
  later.skip(apart);
  for (; rows.any(); to += columns.stride) {
    fetch(later, 1, columns.count);
    copy_row<T, E>(rows.next(), columns, to);
  }
}

// Rows of whole vectors of words, `apart` bytes from one to the next: the caller's own where they are that already, else a copy.
struct WordRows {
  const char* data;
  int64_t apart;
  const char* row(int64_t i) const { return data + i * apart; }
};

// Whether the words of a row of T are what is multiplied, whole vectors of them.
template <class T, class E>
static inline bool are_vectors(const Columns<E>& columns) { return are_words<T, E> && columns.count % (VL * E::n) == 0; }

// Of one head, rows [begin, end) counted from a token, to row `begin` of `copy` on.
template <class T, class E>
static inline void copy_block(const View& x, int64_t token, int64_t head, int begin, int end, const Columns<E>& columns, float* copy) {
  copy_rows<T, E>({x, token + begin, head, 1, 0, end - begin}, columns, copy + begin * columns.stride);
}

// The same rows where they lie, or else as a copy.
template <class T, class E>
static inline WordRows word_rows(const View& x, int64_t token, int64_t head, int begin, int end, const Columns<E>& columns, float* copy) {
  if (are_vectors<T>(columns))
    return {(const char*)row_of<T>(x, token, head), x.token * (int64_t)sizeof(T)};
  copy_block<T>(x, token, head, begin, end, columns, copy);
  return {(const char*)copy, columns.stride * (int64_t)sizeof(float)};
}

// Whether a tensor's rows are whole words, and where words may be.
template <class T, class E>
static inline bool lie_as_words(const View& x, const Columns<E>& columns) {
  return are_words<T, E> && columns.count % E::n == 0 && x.token % E::n == 0 && x.head % E::n == 0 && (uintptr_t)x.data % sizeof(float) == 0;
}

// The same as the left side of a product.
template <class T, class E>
static inline Left left_rows(const View& x, int64_t token, int64_t head, int begin, int end, const Columns<E>& columns, float* copy) {
  if (lie_as_words<T>(x, columns)) return {(const float*)row_of<T>(x, token, head), (long)(x.token / E::n), 1};
  copy_block<T>(x, token, head, begin, end, columns, copy);
  return {copy, (long)columns.stride, 1};
}

// VL rows of whole vectors of words, at `row(i)`, as columns of a panel of WIDTH.
template <int WIDTH, class Row>
static inline void pack_vector(const Row& row, int64_t words, float* to) {
  for (int64_t w = 0; w < words; w += VL) {
    vf square[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) square[i] = load_bytes(row(i) + w * (int64_t)sizeof(float));
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) store(to + (w + i) * WIDTH, square[i]);
  }
}

// Rows of a tile, VL at a time, as columns of its panels; lanes past the last row hold it again.
template <class T, class E, int WIDTH>
static void pack_tile(Rows<T> rows, int count, const Columns<E>& columns, float* copy, float* to) {
  bool in_place = are_vectors<T>(columns);
  for (int t = 0; t < count; t += VL) {
    const char* at[VL];
    for (int i = 0; i < VL; i++) {
      if (t + i >= count) {
        at[i] = at[i - 1];
      } else if (in_place) {
        at[i] = (const char*)rows.next();
      } else {
        float* row = copy + i * columns.stride;
        copy_row<T, E>(rows.next(), columns, row);
        at[i] = (const char*)row;
      }
    }
    pack_vector<WIDTH>([&](int i) { return at[i]; }, columns.stride, to + t / WIDTH * WIDTH * columns.stride + t % WIDTH);
  }
}

// Of a block's rows, those of tokens [begin, end), at least one; lanes up to whole vectors hold any of them.
template <class E, int WIDTH>
static void pack_along(const WordRows& rows, const Columns<E>& columns, int begin, int end, float* to) {
  for (int t = begin / VL * VL; t < end; t += VL) {
    for (int next = t + VL; next < std::min(t + 2 * VL, end); next++) prefetch(rows.row(next), columns.words * (int64_t)sizeof(float));
    pack_vector<WIDTH>([&](int i) { return rows.row(std::min(std::max(t + i, begin), end - 1)); }, columns.stride,
                       to + t / WIDTH * WIDTH * columns.stride + t % WIDTH);
  }
}

// Rows as B of a product that sums over tokens, by panels of columns.
struct Across {
  const float* data;
  long row, panel;
  Right at(int64_t column) const { return {data + column / NR * panel, row}; }
};

// Of the rows of at most `tokens`, those of [begin, end), at least one, packed into `to`; of a word, the element outside is a neighbour's.
template <class E, class Row, class Seen>
static Across pack_across(const Row& row, const Columns<E>& columns, int tokens, int begin, int end, float* to, Seen& seen) {
  static_assert(E::n == 2, "rows of single floats are that already");
  int64_t words = tokens / E::n;
  auto at = [&](int64_t column, int64_t word) { return to + column / NR * NR * words + word * NR + column % NR; };
  Seen own = seen;  // in registers
  for (int64_t t = begin / E::n; t < ceil_div(end, E::n); t++) {
    const char *first = row(std::max<int64_t>(t * E::n, begin)), *second = row(std::min<int64_t>(t * E::n + 1, end - 1));
    for (int64_t w = 0; w < columns.stride; w += VL) {
      vf even = load_bytes(first + w * (int64_t)sizeof(float)), odd = load_bytes(second + w * (int64_t)sizeof(float));
      own.see(0, even), own.see(1, odd);
      store(at(2 * w, t), interleave_halves<false>(even, odd));
      if (2 * w + VL < columns.count) store(at(2 * w + VL, t), interleave_halves<true>(even, odd));
    }
  }
  seen = own;
  return {to, NR, NR * words};
}

// The same. Where a word is one element they are rows already, and only copied: products read them again and again. `copy`: where they may lie.
template <class E>
static inline Across rows_across(const WordRows& rows, const Columns<E>& columns, int begin, int end, float* copy, float* to, Scan<E>& seen) {
  if constexpr (E::n == 1) {
    if (rows.data != (const char*)copy) {
      for (int i = begin; i < end; i++) {
        constexpr int apart = 8;
        if (i + apart < end) prefetch(rows.row(i + apart), columns.words * (int64_t)sizeof(float));
        copy_row((const float*)rows.row(i), columns, copy + i * columns.stride, seen);
      }
    } else {
      seen.see_all(copy + begin * columns.stride, (end - begin) * columns.stride);
    }
    return {copy, columns.stride, NR};
  } else {
    return pack_across<E>([&](int64_t i) { return rows.row(i); }, columns, BLOCK_K, begin, end, to, seen);
  }
}

// Rows of sums that are made step by step, and what they hold.
class SumRows {
 public:
  enum State : char { EMPTY, SUMS, WRITTEN };  // WRITTEN: the result is where the caller wants it
  SumRows(int64_t rows, int64_t columns) : sums(rows * columns), states(rows), columns(columns) {}
  void reset(int64_t rows) { std::fill_n(states.begin(), rows, EMPTY); }
  float* row(int64_t i) const { return sums + i * columns; }
  State state(int64_t i) const { return states[i]; }
  void set_written(int64_t i, int64_t count) { std::fill_n(states.begin() + i, count, WRITTEN); }

  // Before something goes to rows: whether it is to be added. Those that hold nothing yet then become 0.
  bool prepare(int64_t i, int64_t count) {
    int64_t held = 0;
    for (int64_t row = i; row < i + count; row++) held += states[row] == SUMS;
    if (held == count) return true;
    for (int64_t row = i; row < i + count; row++) {
      if (held && states[row] == EMPTY) clear(row);
      states[row] = SUMS;
    }
    return held > 0;
  }

  // Whether a row is yet to be written, when all is summed up: 0 where nothing came.
  bool complete(int64_t i) {
    if (states[i] == EMPTY) clear(i);
    return states[i] != WRITTEN;
  }

 private:
  void clear(int64_t i) { std::fill_n(row(i), columns, 0.f); }

  Buffer sums;
  std::vector<State> states;
  int64_t columns;
};

constexpr int64_t STREAMED = 1 << 20;  // bytes of a tensor that is written past the caches: it would not stay there anyway

// Whether rows of a tensor, contiguous, are to be written past the caches. `row` and `size` in bytes.
static inline bool to_stream(const void* data, int64_t row, int64_t size) {
  return row % LINE == 0 && (uintptr_t)data % LINE == 0 && size >= STREAMED;
}

// A row times a weight; to a line at a time where it is streamed.
template <class T>
static inline void write_row(const float* __restrict from, float weight, int64_t count, T* __restrict to, bool stream) {
  constexpr int n = LINE / sizeof(T) / VL;  // vectors that make a line
  int64_t c = 0;
  if constexpr (has_put_row<T>) {
    for (; c + n * VL <= count; c += n * VL) {
      vf x[n];
#pragma GCC unroll 8
      for (int j = 0; j < n; j++) x[j] = load(from + c + j * VL) * weight;
      put_row(to + c, x, stream);
    }
  } else if (stream) {
    constexpr int64_t in_line = LINE / sizeof(T);
    for (; c < count; c += in_line) {
      T line[in_line];
      for (int64_t i = 0; i < in_line; i++) narrow(from[c + i] * weight, line + i);
      stream_line(to + c, line);
    }
  }
  for (; c < count; c++) narrow(from[c] * weight, to + c);
}
