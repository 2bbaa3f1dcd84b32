// From scores and gradients of probabilities to probabilities and gradients of scores.
#pragma once
#include "attention.h"
#include "simd.h"

// Logits below this magnitude lose too little by rounding to matter.
constexpr float ORDINARY = 256;

// One row of a tile, while its scores are differentiated.
struct Row {
  float lse;
  vf delta;
  int r0, r1;  // the columns that it attends
  bool is_ordinary() const { return std::abs(lse) < ORDINARY; }
};

struct Gradient { vf prob, dscore; };

// Of VL scores and gradients of probabilities; dscore is times the scale, as dq and dk need it. Logits of `ORDINARY` rows take the lse off in units of
// log 2, in one step. Others are rounded, by themselves, as the lse was. Its rounding alone may put them above it, which no logit is: their probability
// is 1.
template <bool PARTIAL, bool ALL_ORDINARY>
static inline Gradient differentiate(const Problem& p, const Row& row, int c, vf score, vf dprob) {
  vf exponent, slope = splat(1.f);
  auto less_lse = [&](vf x, float factor) {
    if (ALL_ORDINARY) return x * (factor * LOG2E) + splat(-row.lse * LOG2E);
    return vmin(vf{}, rounded(x * factor) - splat(row.lse)) * LOG2E;
  };
  if (p.softcap > 0) {
    vf t = tanhv(score * p.scale * (1.f / p.softcap));
    exponent = less_lse(t, p.softcap);
    slope = 1.f - t * t;
  } else {
    exponent = less_lse(score, p.scale);
  }
  vf prob = exp2v(exponent), dscore = prob * (dprob * p.scale - row.delta);
  if (p.softcap > 0) dscore = dscore * slope;
  if (PARTIAL) {
    vi attended = inside(c, row.r0, row.r1);
    prob = attended ? prob : vf{}, dscore = attended ? dscore : vf{};
  }
  return {prob, dscore};
}
