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

// C has M rows of N vectors, c_row apart.
template <class E, int M, int N, bool ADD>
static void micro(int K, const float* __restrict a, long a_row, long a_col, const float* __restrict b, long b_row, float* __restrict c, long c_row) {
  vf acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) acc[i][j] = vf{};
  for (int k = 0; k < K; k++) {
    vf row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) row[j] = load(b + j * VL);
    b += b_row;
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      vf x = splat(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) acc[i][j] = E::madd(x, row[j], acc[i][j]);
    }
    a += a_col;
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      float* to = c + i * c_row + j * VL;
      store(to, ADD ? load(to) + acc[i][j] : acc[i][j]);  // a short sum added to a long one: less rounding than one long chain
    }
}

typedef void Micro(int, const float*, long, long, const float*, long, float*, long);
template <class E, bool ADD, size_t... i>
static Micro* pick_micro(int rows, int vectors, std::index_sequence<i...>) {
  static constexpr Micro* all[] = {micro<E, i / NV + 1, i % NV + 1, ADD>...};
  return all[(rows - 1) * NV + vectors - 1];
}

// As micro, for 1 to MR rows and 1 to NV vectors.
template <class E, bool ADD>
static inline void multiply(int rows, int vectors, int K, const Left& a, const Right& b, float* c, long c_row) {
  pick_micro<E, ADD>(rows, vectors, std::make_index_sequence<MR * NV>{})(K, a.data, a.row, a.column, b.data, b.row, c, c_row);
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
template <class E>
static inline void multiply_elements(bool add, int rows, int vectors, int64_t begin, int64_t end, const Left& a, const Right& b, float* c,
                                     long c_row) {
  auto words = [&](int64_t first, int64_t last, const Right& from) {
    auto* product = add ? multiply<E, true> : multiply<E, false>;
    product(rows, vectors, (int)(last - first), {a.data + first * a.column, a.row, a.column}, from, c, c_row);
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
