// From scores and gradients of probabilities to probabilities and gradients of scores.
#pragma once
#include "attention.h"
#include "simd.h"

// One row of a tile, while its scores are differentiated.
struct Row {
  vf lse, delta;
  int r0, r1;  // the columns that it attends
};

struct Gradient { vf prob, dscore; };

// Of VL scores and gradients of probabilities; dscore is times the scale, as dq and dk need it. Logits are rounded as in the forward. Where they
// are large, the lse's rounding alone may put them above it, which no logit is: their probability is 1.
template <bool PARTIAL>
static inline Gradient differentiate(const Problem& p, const Row& row, int c, vf score, vf dprob) {
  vf logit, slope = splat(1.f);
  if (p.softcap > 0) {
    vf t = tanhv(score * p.scale * (1.f / p.softcap));
    logit = rounded(t * p.softcap);
    slope = 1.f - t * t;
  } else {
    logit = rounded(score * p.scale);
  }
  vf prob = exp2v(vmin(vf{}, logit - row.lse) * LOG2E), dscore = prob * (dprob * p.scale - row.delta);
  if (p.softcap > 0) dscore = dscore * slope;
  if (PARTIAL) {
    vi attended = inside(c, row.r0, row.r1);
    prob = attended ? prob : vf{}, dscore = attended ? dscore : vf{};
  }
  return {prob, dscore};
}
