// The micro-kernel of all products, over operands of 32-bit words: C[M x N] (+)= A[M x K] B[K x N], C in float.
//
// A word holds `n` neighbours along the axis that is summed over: one float, or two bfloat16 where the processor multiplies those. Words travel
// as floats, which are only moved.
#pragma once
#include "attention.h"
#include "elements.h"
#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#define NATIVE_BF16 1
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#define NATIVE_BF16 1
#endif

struct Single {
  static constexpr int n = 1;
  static vf madd(vf a, vf b, vf c) { return c + a * b; }
  // VL columns from column c of a row.
  static void put(float* row, int c, vf x) { store(row + c, x); }
  // The words of the elements that share one, column by column.
  static vf word(const vf (&x)[1]) { return x[0]; }
};

#if defined(NATIVE_BF16)
// Subnormal bfloat16 count as 0, in products and where the processor rounds.
struct Pairs {
  static constexpr int n = 2;
#if defined(__AVX512BF16__)
  typedef __m256i Halves;
  static vf madd(vf a, vf b, vf c) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b); }
  static Halves round(vf x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
  static vf round(vf low, vf high) { return (vf)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
  static vf word(const vf (&x)[2]) {
    vf halves = round(x[0], x[1]);
    return interleave_halves<false>(halves, (vf)_mm512_shuffle_f64x2((__m512d)halves, (__m512d)halves, 0xee));
  }
#else
  typedef uint16x4_t Halves;
  static vf madd(vf a, vf b, vf c) {
    return (vf)vbfdotq_f32((float32x4_t)c, vreinterpretq_bf16_f32((float32x4_t)a), vreinterpretq_bf16_f32((float32x4_t)b));
  }
  static Halves round(vf x) { return vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)x)); }
  static vi widen(Halves x) { return (vi)vmovl_u16(x); }
  static vf word(const vf (&x)[2]) { return (vf)(widen(round(x[0])) | widen(round(x[1])) << 16); }
#endif
  static void put(float* row, int c, vf x) {
    Halves halves = round(x);
    memcpy((char*)row + 2 * c, &halves, sizeof halves);
  }
};
#endif

// What elements of the caller are multiplied as.
template <class T> struct ProductOf { typedef Single type; };
#if defined(NATIVE_BF16)
template <> struct ProductOf<bf16> { typedef Pairs type; };
#endif

// Whole vectors to a row of T; `stream`: past the caches.
template <int N>
static inline void put_row(float* to, const vf (&x)[N], bool stream) {
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) {
    if (stream && sizeof(vf) == LINE) stream_line(to + j * VL, &x[j]);
    else store(to + j * VL, x[j]);
  }
}
#if defined(NATIVE_BF16)
template <int N>
static inline void put_row(bf16* to, const vf (&x)[N], bool stream) {
  int j = 0;
#if defined(__AVX512BF16__)
#pragma GCC unroll 4
  for (; j + 2 <= N; j += 2) {
    vf line = Pairs::round(x[j], x[j + 1]);
    if (stream) stream_line(to + j * VL, &line);
    else memcpy(to + j * VL, &line, sizeof line);
  }
#endif
  (void)stream;  // what follows is no whole line
#pragma GCC unroll 8
  for (; j < N; j++) {
    Pairs::Halves halves = Pairs::round(x[j]);
    memcpy(to + j * VL, &halves, sizeof halves);
  }
}
#endif

// Whether whole vectors are put to rows of T.
template <class T> constexpr bool has_put_row = std::is_same<T, float>::value;
#if defined(NATIVE_BF16)
template <> inline constexpr bool has_put_row<bf16> = true;
#endif

// Whether results of type T may leave a product of E as they are made.
template <class E, class T> constexpr bool leaves_as = has_put_row<T> && std::is_same<E, typename ProductOf<T>::type>::value;
// The same of `columns` of them; `wide`: they are wanted in float.
template <class E, class T>
static inline bool may_leave(int64_t columns, bool wide) {
  return leaves_as<E, T> && columns % VL == 0 && (!wide || std::is_same<T, float>::value);
}

// A: the word (i, k) is data[i * row + k * column].
struct Left {
  typedef const float* Data;
  Data data;
  long row, column;
  template <int M>
  struct Walk {  // along k
    Data at;
    long row, column;
    Walk(Data data, long row, long column) : at(data), row(row), column(column) {}
    float operator[](int i) const { return at[i * row]; }
    void step() { at += column; }
  };
};
// The same of rows wherever they lie: the word (i, k) is data[i][k].
struct LeftRows {
  typedef const float* const* Data;
  Data data;
  static constexpr long row = 0, column = 1;
  template <int M>
  struct Walk {
    const float* at[M];
    long k = 0;
    Walk(Data data, long, long) { std::copy_n(data, M, at); }
    float operator[](int i) const { return at[i][k]; }
    void step() { k++; }
  };
};
// B: words side by side, of which as many are used as C has columns; rows `row` words apart.
struct Right {
  const float* data;
  long row;
};

// Where scores go. The terms of one are added in one order, whatever the shape of C: forward and backward must find the same.
struct Scores {
  static constexpr bool in_order = true;
  float* data;
  long row;
  template <int N>
  void put(int i, const vf (&products)[N]) const {
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) store(data + i * row + j * VL, products[j]);
  }
};

// Where C goes: to rows of floats, or added to them.
struct Sums {
  static constexpr bool in_order = false;
  float* data;
  long row;
  bool add;
  void add_before() { add = true; }
  template <int N>
  void put(int i, const vf (&products)[N]) const {
    float* to = data + i * row;
#pragma GCC unroll 8
    for (int j = 0; j < N; j++)
      store(to + j * VL, add ? load(to + j * VL) + products[j] : products[j]);  // a short sum added to a long one: less rounding than one long chain
  }
};

// Where C goes: with what `sums` hold where `add`, times a weight for each row if there are any, to rows of the caller's.
template <class T>
struct Results {
  static constexpr bool in_order = false;
  Sums sums;
  const float* weights;
  T* const* rows;
  int64_t column;
  bool stream;
  void add_before() { sums.add = true; }
  template <int N>
  void put(int i, const vf (&products)[N]) const {
    vf x[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) x[j] = sums.add ? load(sums.data + i * sums.row + j * VL) + products[j] : products[j];
    if (weights) {
      vf weight = splat(weights[i]);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) x[j] *= weight;
    }
    put_row(rows[i] + column, x, stream);
  }
};

// C has M rows of N vectors.
template <class E, int M, int N, class From, class To>
static void micro(int K, typename From::Data a, long a_row, long a_column, const float* __restrict b, long b_row, const To& to) {
  constexpr int chains = !To::in_order && 2 * M * N <= 12 ? 2 : 1;  // a sum's next term waits for the one before: few sums are made in halves
  vf acc[chains][M][N];
#pragma GCC unroll 2
  for (int h = 0; h < chains; h++)
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) acc[h][i][j] = vf{};
  typename From::template Walk<M> words(a, a_row, a_column);
  auto step = [&](vf(&sums)[M][N]) {
    vf row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) row[j] = load(b + j * VL);
    b += b_row;
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      vf x = splat(words[i]);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) sums[i][j] = E::madd(x, row[j], sums[i][j]);
    }
    words.step();
  };
  int k = 0;
  for (; k + chains <= K; k += chains)
#pragma GCC unroll 2
    for (int h = 0; h < chains; h++) step(acc[h]);
  if (chains > 1) {
    if (k < K) step(acc[0]);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) acc[0][i][j] += acc[chains - 1][i][j];
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++) to.put(i, acc[0][i]);
}

template <class From, class To>
using Micro = void(int, typename From::Data, long, long, const float*, long, const To&);
template <class E, class From, class To, size_t... i>
static Micro<From, To>* pick_micro(int rows, int vectors, std::index_sequence<i...>) {
  static constexpr Micro<From, To>* all[] = {micro<E, i / NV + 1, i % NV + 1, From, To>...};
  return all[(rows - 1) * NV + vectors - 1];
}

// As micro, for 1 to MR rows and 1 to NV vectors.
template <class E, class From, class To>
static inline void multiply(int rows, int vectors, int K, const From& a, const Right& b, const To& to) {
  pick_micro<E, From, To>(rows, vectors, std::make_index_sequence<MR * NV>{})(K, a.data, a.row, a.column, b.data, b.row, to);
}

// The elements, and those that share a word with them, where these are allowed.
template <class E>
static inline Range whole_words(Range x, const Range& allowed) {
  if (x.begin % E::n && x.begin > allowed.begin) x.begin--;
  if (x.end % E::n && x.end < allowed.end) x.end++;
  return x;
}

// As multiply_elements, where words are cut: parts of the sum are kept in `sums`.
template <class E, class To>
static inline void multiply_cut(int rows, int vectors, const Range& range, const Left& a, const Right& b, Sums sums, To to) {
  int64_t first = ceil_div(range.begin, E::n), end = range.end / E::n;
  bool cut_first = range.begin % E::n, cut_last = range.end % E::n;
  auto words = [&](int64_t word, int64_t count, const Right& from, bool is_last) {
    Left left{a.data + word * a.column, a.row, a.column};
    if (is_last) return multiply<E>(rows, vectors, (int)count, left, from, to);
    multiply<E>(rows, vectors, (int)count, left, from, sums);
    sums.add_before(), to.add_before();
  };
  auto half = [&](int64_t word, int32_t mask, bool is_last) {
    float kept[NR];
    for (int j = 0; j < vectors * VL; j += VL) store(kept + j, (vf)((vi)load(b.data + word * b.row + j) & mask));
    words(word, 1, {kept, NR}, is_last);
  };
  if (cut_first) half(range.begin / 2, (int32_t)0xffff0000, !cut_last && first >= end);
  if (cut_last) half(range.end / 2, 0xffff, first >= end);
  if (first < end) words(first, end - first, {b.data + first * b.row, b.row}, true);
}

// multiply_elements to what was chosen.
template <class E, class To>
static inline void multiply_range(int rows, int vectors, const Range& range, const Left& a, const Right& b, const Sums& sums, const To& to) {
  if constexpr (E::n == 2)
    if ((range.begin | range.end) & 1) return multiply_cut<E>(rows, vectors, range, a, b, sums, to);
  int64_t first = range.begin / E::n;
  multiply<E>(rows, vectors, (int)(range.end / E::n - first), Left{a.data + first * a.column, a.row, a.column}, {b.data + first * b.row, b.row}, to);
}

// A B over the elements of a range of the axis that is summed over, at least one; `a` and `b` are at its element 0. Of a word that is cut, the
// elements outside count as 0 in B, whatever they are; in A they must be finite. It goes to `results` if there are any, which is only where those
// of their type may leave; else to `sums`, which are also those of `results`.
template <class E, class T>
static inline void multiply_elements(int rows, int vectors, const Range& range, const Left& a, const Right& b, const Sums& sums,
                                     const Results<T>* results) {
  if constexpr (leaves_as<E, T>)
    if (results) return multiply_range<E>(rows, vectors, range, a, b, sums, *results);
  multiply_range<E>(rows, vectors, range, a, b, sums, sums);
}
