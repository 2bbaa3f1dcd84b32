// Vectors of floats for the instruction set at hand, by the compiler's vector extension; intrinsics only where it has no word for something.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int VL = 16, MR = 6, NV = 4;  // 24 accumulators of 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int VL = 8, MR = 6, NV = 2;   // 12 of 16
#elif defined(__aarch64__)
constexpr int VL = 4, MR = 6, NV = 4;   // 24 of 32
#else
constexpr int VL = 4, MR = 4, NV = 2;
#endif
constexpr int NR = VL * NV;  // columns of a packed panel

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));  // whose sums may overflow
typedef float vf_anywhere __attribute__((vector_size(VL * 4), aligned(4), may_alias));

static inline vf load(const float* p) { return *(const vf_anywhere*)p; }
static inline vf load_bytes(const char* p) {  // from wherever
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
static inline void store(float* p, vf x) { *(vf_anywhere*)p = x; }
static inline vf splat(float x) { return x - vf{}; }  // x - 0 is x, also for -0: no addition is left
// Where one is NaN, both give b.
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
static inline vf vmin(vf a, vf b) { return a < b ? a : b; }

// x, which the compiler would otherwise leave unrounded where a sum is made of a product: it fuses both, unless it cannot see the product.
static inline vf rounded(vf x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

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

// The lanes a0 b0 a1 b1 ... of the lower (HIGH: upper) halves of two vectors.
template <bool HIGH, class V, class Lane, size_t... i>
static inline V interleave_lanes(V a, V b, std::index_sequence<i...>) {
  constexpr size_t lanes = sizeof...(i), from = HIGH ? lanes / 2 : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (i / 2 + from + i % 2 * lanes)...);
#else
  typedef Lane index __attribute__((vector_size(VL * 4)));
  return __builtin_shuffle(a, b, index{(Lane)(i / 2 + from + i % 2 * lanes)...});
#endif
}
template <bool HIGH>
static inline vf interleave(vf a, vf b) {
  return interleave_lanes<HIGH, vf, int32_t>(a, b, std::make_index_sequence<VL>{});
}
template <bool HIGH>
static inline vf interleave_halves(vf a, vf b) {
  typedef int16_t vh __attribute__((vector_size(VL * 4)));
  return (vf)interleave_lanes<HIGH, vh, int16_t>((vh)a, (vh)b, std::make_index_sequence<VL * 2>{});
}

// The transpose of VL x VL lanes: log2(VL) perfect shuffles of the rows.
static inline void transpose(vf (&rows)[VL]) {
  vf other[VL];
#pragma GCC unroll 4
  for (int step = 1; step < VL; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < VL / 2; i++) {
      other[2 * i] = interleave<false>(rows[i], rows[i + VL / 2]);
      other[2 * i + 1] = interleave<true>(rows[i], rows[i + VL / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) rows[i] = other[i];
  }
}

static inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
  int32_t some = 0;
  for (int i = 0; i < VL; i++) some |= mask[i];
  return some;
#endif
}

// A cache line to where it will not be read soon: past the caches, where the instruction set has a word for that. Such writes are seen by other
// threads after `finish_streams`.
constexpr int LINE = 64;
static inline void stream_line(void* to, const void* line) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(line));
#else
  memcpy(to, line, LINE);
#endif
}
static inline void finish_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// 2^f for f in [-1/2, 1/2]: a polynomial of degree 6 (Cephes exp2f coefficients), exact at 0.
static inline vf exp2_near_0(vf f) {
  vf p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  return p * f + 1.f;
}

// 2^x; below the normal numbers subnormal or 0, NaN of NaN.
static inline vf exp2v(vf x) {
#if defined(__AVX512F__)
  vf clamped = (vf)_mm512_max_ps((__m512)splat(-152.f), (__m512)x), whole = (vf)_mm512_roundscale_ps((__m512)clamped, 0);
  return (vf)_mm512_scalef_ps((__m512)exp2_near_0(clamped - whole), (__m512)whole);
#else
  vf clamped = vmin(splat(127.f), vmax(splat(-126.f), x));
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = clamped + magic;
  vf p = exp2_near_0(clamped - (shifted - magic));
  vi biased = (vi)shifted - (0x4B400000 - 127);
  vf scaled = p * (vf)(biased << 23);  // a product, for NaN to stay NaN
  return x < splat(-126.f) ? vf{} : scaled;
#endif
}

// log2 x of a positive normal number; NaN of NaN and infinity. x is 2^whole m, and log2 m a series in (m - 1) / (m + 1).
static inline vf log2v(vf x) {
  vi whole = (vi)((vu)x - 0x3f3504f3u) >> 23;  // m in [1/sqrt 2, sqrt 2)
  vf m = (vf)((vu)x - ((vu)whole << 23)), s = (m - 1.f) / (m + 1.f), s2 = s * s;
  vf series = 2.885390082f + s2 * (0.961796694f + s2 * (0.577078016f + s2 * (0.412198583f + s2 * 0.320598898f)));
  return __builtin_convertvector(whole, vf) + s * series + (x - x);
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
