// Elements of the caller's tensors: float, bfloat16, half; to and from float.
#pragma once
#include <cstdint>
#include <cstring>

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline float widen(fp16 x) {
  // Move exponent and mantissa into a float's place and rescale: exact for normal and subnormal halves alike.
  uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13, sign = (uint32_t)(x.bits & 0x8000) << 16, u;
  float f;
  memcpy(&f, &magnitude, 4);
  f *= 5.192296858534828e33f;  // 2^112
  memcpy(&u, &f, 4);
  if ((x.bits & 0x7c00) == 0x7c00) u |= 0x7f800000;  // infinity or NaN
  u |= sign;
  memcpy(&f, &u, 4);
  return f;
}

static inline void narrow(float x, float* out) { *out = x; }
static inline void narrow(float x, bf16* out) {
  uint32_t u;
  memcpy(&u, &x, 4);
  bool nan = (u & 0x7fffffff) > 0x7f800000;
  out->bits = nan ? (uint16_t)(u >> 16 | 0x40) : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline void narrow(float x, fp16* out) {
  uint32_t u;
  memcpy(&u, &x, 4);
  uint32_t sign = u & 0x80000000, rest = u & 0x7fffffff;
  uint16_t half;
  if (rest >= 0x47800000) {  // 65536 and above: infinity, or NaN
    half = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (rest < 0x38800000) {  // below the normal halves: let the float adder round to multiples of 2^-24
    float f;
    memcpy(&f, &rest, 4);
    f += 0.5f;
    memcpy(&u, &f, 4);
    half = (uint16_t)(u - 0x3f000000);
  } else {
    rest += 0xc8000fff + ((rest >> 13) & 1);  // rebias by 15 - 127 and round to nearest even
    half = (uint16_t)(rest >> 13);
  }
  out->bits = half | (uint16_t)(sign >> 16);
}

template <class T>
static inline void narrow_row(const float* __restrict from, int64_t count, T* __restrict to) {
  for (int64_t i = 0; i < count; i++) narrow(from[i], to + i);
}
