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
};

#if defined(NATIVE_BF16)
// Subnormal bfloat16 count as 0 in products.
struct Pairs {
  static constexpr int n = 2;
#if defined(__AVX512BF16__)
  typedef __m256i Halves;
  static vf madd(vf a, vf b, vf c) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b); }
  static Halves round(vf x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
  static vi widen(Halves x) { return (vi)_mm512_cvtepu16_epi32(x); }
#else
  typedef uint16x4_t Halves;
  static vf madd(vf a, vf b, vf c) {
    return (vf)vbfdotq_f32((float32x4_t)c, vreinterpretq_bf16_f32((float32x4_t)a), vreinterpretq_bf16_f32((float32x4_t)b));
  }
  static Halves round(vf x) { return vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)x)); }
  static vi widen(Halves x) { return (vi)vmovl_u16(x); }
#endif
  static void put(float* row, int c, vf x) {
    Halves halves = round(x);
    memcpy((char*)row + 2 * c, &halves, sizeof halves);
  }
  // The words of two neighbours, column by column.
  static vf zip(vf even, vf odd) { return (vf)(widen(round(even)) | widen(round(odd)) << 16); }
};
#endif

// What elements of the caller are multiplied as.
template <class T> struct ProductOf { typedef Single type; };
#if defined(NATIVE_BF16)
template <> struct ProductOf<bf16> { typedef Pairs type; };
#endif

template <int N>
static inline void put_row(float* to, const vf (&x)[N], bool stream) {
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) {
    if (stream) stream_line(to + j * VL, &x[j]);
    else store(to + j * VL, x[j]);
  }
}
template <int N>
static inline void put_row(bf16* to, const vf (&x)[N], bool stream) {
  if constexpr (N % 2 == 0) {
#pragma GCC unroll 8
    for (int j = 0; j < N; j += 2) {
      __m512i line = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[j + 1], (__m512)x[j]);
      if (stream) _mm512_stream_si512((__m512i*)(to + j * VL), line);
      else _mm512_storeu_si512(to + j * VL, line);
    }
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) _mm256_storeu_si256((__m256i*)(to + j * VL), (__m256i)_mm512_cvtneps_pbh((__m512)x[j]));
  }
}

// A: the word (i, k) is data[i * row + k * column].
struct Left {
  const float* data;
  long row, column;
};
// B: words side by side, of which as many are used as C has columns; rows `row` words apart.
struct Right {
  const float* data;
  long row;
};

// Where C goes: to rows of floats, or added to them.
template <bool ADD>
struct Sums {
  float* data;
  long row;
  template <int N>
  void put(int i, const vf (&sums)[N]) const {
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      float* to = data + i * row + j * VL;
      store(to, ADD ? load(to) + sums[j] : sums[j]);  // a short sum added to a long one: less rounding than one long chain
    }
  }
};

// Rows of the caller's, times a weight each; where `sums`, these are added before.
template <class O>
struct Results {
  O* const* rows;
  const float* weights;
  int64_t column;
  const float* sums;
  long row;
  bool stream;
  template <int N>
  void put(int i, const vf (&products)[N]) const {
    vf weight = splat(weights[i]), x[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) x[j] = (sums ? load(sums + i * row + j * VL) + products[j] : products[j]) * weight;
    put_row(rows[i] + column, x, stream);
  }
};

// C has M rows of N vectors.
template <class E, int M, int N, class To>
static void micro(int K, const float* __restrict a, long a_row, long a_col, const float* __restrict b, long b_row, const To& to) {
  constexpr int chains = 2 * M * N <= 12 ? 2 : 1;  // a sum's next term waits for the one before: few sums are made in halves
  vf acc[chains][M][N];
#pragma GCC unroll 2
  for (int h = 0; h < chains; h++)
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) acc[h][i][j] = vf{};
  auto step = [&](vf(&to)[M][N]) {
    vf row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) row[j] = load(b + j * VL);
    b += b_row;
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      vf x = splat(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) to[i][j] = E::madd(x, row[j], to[i][j]);
    }
    a += a_col;
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

template <class To>
using Micro = void(int, const float*, long, long, const float*, long, const To&);
template <class E, class To, size_t... i>
static Micro<To>* pick_micro(int rows, int vectors, std::index_sequence<i...>) {
  static constexpr Micro<To>* all[] = {micro<E, i / NV + 1, i % NV + 1, To>...};
  return all[(rows - 1) * NV + vectors - 1];
}

// As micro, for 1 to MR rows and 1 to NV vectors.
template <class E, class To>
static inline void multiply(int rows, int vectors, int K, const Left& a, const Right& b, const To& to) {
  pick_micro<E, To>(rows, vectors, std::make_index_sequence<MR * NV>{})(K, a.data, a.row, a.column, b.data, b.row, to);
}

// The elements, and those that share a word with them, where these are allowed.
template <class E>
static inline Range whole_words(Range x, const Range& allowed) {
  if (x.begin % E::n && x.begin > allowed.begin) x.begin--;
  if (x.end % E::n && x.end < allowed.end) x.end++;
  return x;
}

// C = A B, or C += A B where `add`, over the elements [begin, end) of the axis that is summed over, at least one; `a` and `b` are at its element
// 0. Of a word that is cut, the elements outside count as 0 in B, whatever they are; in A they must be finite.
template <class E, class Finish>
static inline void multiply_elements(bool add, int rows, int vectors, int64_t begin, int64_t end, const Left& a, const Right& b, float* c,
                                     long c_row, const Finish& finish) {
  if (finish.rows && (E::n == 1 || (begin % 2 == 0 && end % 2 == 0))) {
    Finish x = finish;
    if (!add) x.sums = nullptr;
    begin /= E::n, end /= E::n;
    multiply<E>(rows, vectors, (int)(end - begin), {a.data + begin * a.column, a.row, a.column}, {b.data + begin * b.row, b.row}, x);
    return;
  }
  auto words = [&](int64_t first, int64_t last, const Right& from) {
    Left left{a.data + first * a.column, a.row, a.column};
    if (add) multiply<E>(rows, vectors, (int)(last - first), left, from, Sums<true>{c, c_row});
    else multiply<E>(rows, vectors, (int)(last - first), left, from, Sums<false>{c, c_row});
    add = true;
  };
  int64_t first = (begin + E::n - 1) / E::n, last = end / E::n;
  if (first < last) words(first, last, {b.data + first * b.row, b.row});
  if constexpr (E::n == 2) {
    auto half = [&](int64_t word, int32_t mask) {
      float kept[NR];
      for (int j = 0; j < vectors * VL; j += VL) store(kept + j, (vf)((vi)load(b.data + word * b.row + j) & mask));
      words(word, word + 1, {kept, NR});
    };
    if (begin % 2) half(begin / 2, (int32_t)0xffff0000);
    if (end % 2) half(end / 2, 0xffff);
  }
}
