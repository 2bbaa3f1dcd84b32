// Tiles of the forward: rows, which are (query, head of a group), lie side by side in lanes, keys one below the other. So a softmax needs no sums or
// maxima across lanes, and a key costs no more lanes than attend it.
#pragma once
#include "bands.h"
#include "product.h"

// Rows of a tile: whole strips and whole vectors. They are multiplied PANEL vectors at a time.
constexpr int LANES = 48, VECTORS = LANES / VL, PANEL = VECTORS % NV ? 3 : NV;
static_assert(LANES % MR == 0 && LANES % VL == 0 && VECTORS % PANEL == 0 && PANEL <= NV);

static inline vi load_ints(const int* p) { return (vi)load((const float*)p); }

// What the lanes of a tile attend of a block of keys by one band: keys are counted from the block's beginning. Lanes that attend nothing have
// left = right = 0.
struct LaneSpans {
  alignas(LINE) int left[LANES], right[LANES];
  Span vectors[VECTORS], full[VECTORS], strips[LANES / MR];  // of any lane; of all lanes; of any of MR lanes
  int first = BLOCK_K, last = 0;                             // of any lane of the tile, from a whole word on

  // The tile's lane 0 is the head `skipped` of query `a`; the band's queries `q` alone attend something.
  LaneSpans(const Band& band, const Range& q, const Range& keys, int64_t a, int skipped, int rows, int group) {
    int row = 0;
    for (int64_t query = a; row < rows; query++, skipped = 0) {
      BandTile x{band, query, 0, 1, 1, keys};
      Span span = query >= q.begin && query < q.end ? Span{x.left(query), x.right(query)} : Span{0, 0};
      if (span.begin >= span.end) span = {0, 0};
      for (int h = skipped; h < group && row < rows; h++, row++) left[row] = span.begin, right[row] = span.end;
    }
    for (; row < LANES; row++) left[row] = right[row] = 0;
    for (int i = 0; i < VECTORS; i++) {
      vectors[i] = any_of(i * VL, VL);
      full[i] = {*std::max_element(left + i * VL, left + (i + 1) * VL), *std::min_element(right + i * VL, right + (i + 1) * VL)};
      if (vectors[i].begin < vectors[i].end) first = std::min(first, vectors[i].begin), last = std::max(last, vectors[i].end);
    }
    for (int i = 0; i < LANES / MR; i++) strips[i] = any_of(i * MR, MR);
  }

  bool any() const { return first < last; }

 private:
  Span any_of(int lane, int count) const {
    Span span{BLOCK_K, 0};
    for (int i = lane; i < lane + count; i++)
      if (left[i] < right[i]) span = {std::min(span.begin, left[i]), std::max(span.end, right[i])};
    return span.begin < span.end ? span : Span{0, 0};
  }
};

// Scores of a tile, [keys][LANES], to probabilities, as words, [words of keys][LANES], in place. Logits are in units of log 2.
template <class E>
struct Softmax {
  float scale, softcap;

  float factor() const { return softcap > 0 ? LOG2E : scale * LOG2E; }

  // The largest logit of each lane of vector v. With a softcap, scores become capped ones, and `raw_top` is raised to the largest before that.
  vf top(const LaneSpans& x, int v, float* scores, float* raw_top) const {
    vf tops[2] = {splat(-INFINITY), splat(-INFINITY)};
    float f = factor();
    if (softcap > 0) cap(x, v, scores, raw_top);
    each_key(x, v, 2, [&](int key, auto partial) {
      for (int i = 0; i < 2; i++) {
        vf logit = load(scores + (key + i) * LANES + v * VL) * f;
        if (partial) logit = inside(x, v, key + i) ? logit : splat(-INFINITY);
        tops[i] = vmax(tops[i], logit);
      }
    });
    return vmax(tops[0], tops[1]);
  }

  // Returns the sum of each lane.
  vf soften(const LaneSpans& x, int v, float* scores, vf top) const {
    vf sums[E::n] = {};
    float f = factor();
    float* words = scores + v * VL;
    for (int key = x.first; key < x.vectors[v].begin / E::n * E::n; key += E::n) store(words + key / E::n * LANES, vf{});
    each_key(x, v, E::n, [&](int key, auto partial) {
      vf e[E::n];
      for (int i = 0; i < E::n; i++) {
        e[i] = exp2v(rounded(load(scores + (key + i) * LANES + v * VL) * f) - top);  // as for the top, so that it less itself is 0
        if (partial) e[i] = inside(x, v, key + i) ? e[i] : vf{};
        sums[i] += e[i];
      }
      store(words + key / E::n * LANES, E::word(e));
    });
    for (int key = (x.vectors[v].end + E::n - 1) / E::n * E::n; key < x.last; key += E::n) store(words + key / E::n * LANES, vf{});
    for (int i = 1; i < E::n; i++) sums[0] += sums[i];
    return sums[0];
  }

 private:
  static vi inside(const LaneSpans& x, int v, int key) {
    return (load_ints(x.left + v * VL) <= key) & (load_ints(x.right + v * VL) > key);
  }

  // act(key, whether some lanes do not attend it or a key that follows) for every `step` keys of vector v, from a multiple of it on.
  template <class Act>
  static __attribute__((always_inline)) void each_key(const LaneSpans& x, int v, int step, Act&& act) {
    int key = x.vectors[v].begin / step * step, end = x.vectors[v].end;
    int full = std::min((x.full[v].begin + step - 1) / step * step, end), full_end = x.full[v].end / step * step;
    for (; key < full; key += step) act(key, std::true_type{});
    for (; key < full_end; key += step) act(key, std::false_type{});
    for (; key < end; key += step) act(key, std::true_type{});
  }

  void cap(const LaneSpans& x, int v, float* scores, float* raw_top) const {
    vf raw = load(raw_top);
    each_key(x, v, 1, [&](int key, auto) {
      float* at = scores + key * LANES + v * VL;
      vf logit = load(at) * scale;
      vf raised = vmax(raw, logit * LOG2E);
      raw = inside(x, v, key) ? raised : raw;
      store(at, tanhv(logit * (1.f / softcap)) * softcap);
    });
    store(raw_top, raw);
  }
};
