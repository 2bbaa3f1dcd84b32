// Tiles of the forward: rows, which are (query, head of a group), lie side by side in lanes, keys one below the other. So a softmax needs no sums or
// maxima across lanes, and a key costs no more lanes than attend it.
#pragma once
#include "bands.h"
#include "product.h"

// Rows of a tile: whole strips and whole vectors. They are multiplied PANEL vectors at a time.
constexpr int LANES = 48, VECTORS = LANES / VL, PANEL = VECTORS % NV ? 3 : NV;
static_assert(LANES % MR == 0 && LANES % VL == 0 && VECTORS % PANEL == 0 && PANEL <= NV);

// A tile of rows. Lane 0 is the head `skipped` of query `a`; `queries` holds each lane's query, counted from `a`.
struct LaneRows {
  int64_t a;
  int skipped, rows, group;
  const int* queries;
};

// What the lanes of a tile attend of a block of keys by one band. Keys are counted from the block's beginning. The lanes that attend something are
// neighbours, and their spans begin and end the later, the later their queries.
class LaneSpans {
 public:
  alignas(LINE) int left[LANES], right[LANES];  // both 0 where nothing is attended
  Span vectors[VECTORS], full[VECTORS];         // of any, of all lanes of a vector
  Span lanes;                                   // that attend something
  int first, last;                              // of any of these

  // The band's queries `q` alone attend something.
  LaneSpans(const Band& band, const Range& q, const Range& keys, const LaneRows& tile) : queries(tile.queries) {
    k0 = (int)std::max<int64_t>(band.k0 - keys.begin, 0), k1 = (int)(std::min(band.k1, keys.end) - keys.begin);
    lo = near(band.lo + tile.a - keys.begin), hi = near(band.hi + tile.a - keys.begin);
    auto lane_of = [&](int64_t query) {
      return (int)std::min<int64_t>(std::max<int64_t>((query - tile.a) * tile.group - tile.skipped, 0), tile.rows);
    };
    Range some = ::queries_of(band, keys);
    lanes = {lane_of(std::max(q.begin, some.begin)), lane_of(std::min(q.end, some.end))};
    Span all = strip(0, LANES);
    first = all.begin, last = all.end;
    if (!any()) return;
    for (int v = 0; v < VECTORS; v++) {
      int at = v * VL;
      vi query, attends = inside(at, lanes.begin, lanes.end);
      memcpy(&query, queries + at, sizeof query);
      vi l = query + lo, r = query + (hi + 1);
      l = l > k0 ? l : vi{} + k0, r = r < k1 ? r : vi{} + k1;
      l &= attends, r &= attends;
      memcpy(left + at, &l, sizeof l), memcpy(right + at, &r, sizeof r);
      vectors[v] = strip(at, VL);
      full[v] = lanes.begin <= at && at + VL <= lanes.end ? Span{left_of(at + VL - 1), right_of(at)} : Span{BLOCK_K, 0};
    }
  }

  bool any() const { return first < last; }

  // What any of `count` lanes from one on attends.
  Span strip(int lane, int count) const {
    int a = std::max(lane, lanes.begin), b = std::min(lane + count, lanes.end);
    return a < b ? Span{left_of(a), right_of(b - 1)} : Span{0, 0};
  }

 private:
  const int* queries;
  int k0, k1, lo, hi;

  static int near(int64_t x) { return (int)std::min<int64_t>(std::max<int64_t>(x, -(1 << 30)), 1 << 30); }
  int left_of(int lane) const { return std::max(k0, queries[lane] + lo); }
  int right_of(int lane) const { return std::min(k1, queries[lane] + hi + 1); }
};

// Scores of a tile, [keys][LANES], to probabilities, as words, [words of keys][LANES], in place. Scores are subtracted before they are scaled:
// however large they are, that loses nothing between neighbours.
template <class E>
struct Softmax {
  float scale, softcap;

  // A logit is this times a score, or a top times its magnitude.
  float factor() const { return softcap > 0 ? 1.f : scale; }
  vf logit(vf top) const { return rounded(top * std::abs(factor())); }
  // What the sums of a lane shrink by where its top rises.
  vf shrink(vf before, vf top) const { return exp2v((before - top) * (std::abs(factor()) * LOG2E)); }

  // The score of the largest logit of each lane of vector v, negated where the factor is negative. With a softcap, scores become capped ones, and
  // `raw_top` is raised to the largest logit before that.
  vf top(const LaneSpans& x, int v, float* scores, float* raw_top) const {
    if (softcap > 0) cap(x, v, scores, raw_top);
    return factor() < 0 ? largest<true>(x, v, scores) : largest<false>(x, v, scores);
  }

  // Returns the sum of each lane.
  vf soften(const LaneSpans& x, int v, float* scores, vf top) const {
    vf sums[E::n] = {};
    float f = factor() * LOG2E;
    float* words = scores + v * VL;
    top = top > -INFINITY ? top : vf{};  // else no score less itself would be NaN
    if (f < 0) top = -top;
    int first = x.first / E::n * E::n;
    for (int key = first; key < x.vectors[v].begin / E::n * E::n; key += E::n) store(words + key / E::n * LANES, vf{});
    each_key(x, v, E::n, [&](int key, auto partial) {
      vf e[E::n];
      for (int i = 0; i < E::n; i++) {
        e[i] = exp2v((load(scores + (key + i) * LANES + v * VL) - top) * f);
        if (partial) e[i] = attended(x, v, key + i) ? e[i] : vf{};
        sums[i] += e[i];
      }
      store(words + key / E::n * LANES, E::word(e));
    });
    for (int key = std::max(first, (x.vectors[v].end + E::n - 1) / E::n * E::n); key < x.last; key += E::n) store(words + key / E::n * LANES, vf{});
    for (int i = 1; i < E::n; i++) sums[0] += sums[i];
    return sums[0];
  }

 private:
  template <bool NEGATED>
  static vf largest(const LaneSpans& x, int v, const float* scores) {
    vf tops[2] = {splat(-INFINITY), splat(-INFINITY)};
    each_key(x, v, 2, [&](int key, auto partial) {
      for (int i = 0; i < 2; i++) {
        vf score = load(scores + (key + i) * LANES + v * VL);
        if (NEGATED) score = -score;
        if (partial) score = attended(x, v, key + i) ? score : splat(-INFINITY);
        tops[i] = vmax(tops[i], score);
      }
    });
    return vmax(tops[0], tops[1]);
  }

  static vi attended(const LaneSpans& x, int v, int key) {
    vi left, right;
    memcpy(&left, x.left + v * VL, sizeof left), memcpy(&right, x.right + v * VL, sizeof right);
    return (left <= key) & (right > key);
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
      vf raised = vmax(raw, logit);
      raw = attended(x, v, key) ? raised : raw;
      store(at, tanhv(logit * (1.f / softcap)) * softcap);
    });
    store(raw_top, raw);
  }
};
