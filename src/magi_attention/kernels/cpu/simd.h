// Vectors of floats for the instruction set at hand, by the compiler's vector extension alone, and the one micro-kernel on top.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 6, NV = 4;  // 24 accumulators of 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int VL = 8, MR = 6, NV = 2;   // 12 of 16
#elif defined(__aarch64__)
constexpr int VL = 4, MR = 6, NV = 4;   // 24 of 32
#else
constexpr int VL = 4, MR = 4, NV = 2;
#endif
constexpr int NR = VL * NV;  // columns of a packed panel

typedef float vf __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4), may_alias));

static inline vf load(const float* p) { return *(const vf*)p; }
static inline void store(float* p, vf x) { *(vf*)p = x; }
static inline vf splat(float x) { return x - vf{}; }  // x - 0 is x, also for -0: no addition is left
// Where one is NaN, both give b.
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
static inline vf vmin(vf a, vf b) { return a < b ? a : b; }

static inline vi iota() {
  vi r{};
  for (int i = 0; i < VL; i++) r[i] = i;
  return r;
}

// The columns c .. c + VL - 1 that lie in [begin, end), as a lane mask.
static inline vi inside(int c, int begin, int end) {
  vi at = iota() + c;
  return (at >= begin) & (at < end);
}

static inline float sum(vf x) {
  float r = 0;
  for (int i = 0; i < VL; i++) r += x[i];
  return r;
}

static inline float largest(vf x) {
  float r = x[0];
  for (int i = 1; i < VL; i++) r = x[i] > r ? x[i] : r;
  return r;
}

// 2^x, 0 below the normal numbers, NaN of NaN. Polynomial of degree 6 on [-1/2, 1/2] (Cephes exp2f coefficients), exponent by bits.
static inline vf exp2v(vf x) {
  vf clamped = vmin(splat(127.f), vmax(splat(-126.f), x));
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = clamped + magic;
  vf f = clamped - (shifted - magic);
  vi biased = (vi)shifted - (0x4B400000 - 127);
  vf p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.f;
  vf scaled = p * (vf)(biased << 23);  // a product, for NaN to stay NaN
  return x < splat(-126.f) ? vf{} : scaled;
}

static inline vf tanhv(vf x) {
  vf y = vmin(splat(10.f), vmax(splat(-10.f), x));
  vf e = exp2v(y * 2.8853900817779268f);  // e^(2y)
  vf exact = (e - 1.f) / (e + 1.f);
  // Near 0 the quotient loses digits; there the series has them.
  vf y2 = y * y;
  vf series = y * (1.f + y2 * (-0.33333333f + y2 * (0.13333333f + y2 * -0.05396825f)));
  return y2 < splat(0.01f) ? series : exact;
}

// C[M x NR] (+)= A[M x K] B[K x NR]. A(i, k) is at a[i * a_row + k * a_col]; B is a packed panel, row after row; C has row stride c_row.
template <int M, bool ADD>
static inline __attribute__((always_inline)) void micro(int K, const float* __restrict a, long a_row, long a_col, const float* __restrict b,
                                                        float* __restrict c, long c_row) {
  vf acc[M][NV];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) acc[i][j] = vf{};
  for (int k = 0; k < K; k++) {
    vf row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) row[j] = load(b + j * VL);
    b += NR;
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      vf x = splat(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) acc[i][j] += x * row[j];
    }
    a += a_col;
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) {
      float* to = c + i * c_row + j * VL;
      store(to, ADD ? load(to) + acc[i][j] : acc[i][j]);  // a short sum added to a long one: less rounding than one long chain
    }
}

template <bool ADD, int M>
static inline void multiply_rows(int rows, int K, const float* a, long a_row, long a_col, const float* b, float* c, long c_row) {
  if (rows == M) return micro<M, ADD>(K, a, a_row, a_col, b, c, c_row);
  if constexpr (M > 1) multiply_rows<ADD, M - 1>(rows, K, a, a_row, a_col, b, c, c_row);
}

// As micro, for 1 to MR rows.
template <bool ADD>
static void multiply(int rows, int K, const float* a, long a_row, long a_col, const float* b, float* c, long c_row) {
  multiply_rows<ADD, MR>(rows, K, a, a_row, a_col, b, c, c_row);
}
