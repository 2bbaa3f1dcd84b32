// Forward: a task is a tile of queries of one head; online softmax over blocks of keys (Milakov and Gimelshein 2018; Dao et al. 2022).
#include <algorithm>
#include <new>

#include "attention.h"
#include "pack.h"

namespace {

// One tile's running softmax: logits are in units of log 2.
struct Tile {
  Buffer q, scores, out;
  float top[TILE_Q], total[TILE_Q], raw_top;
  Tile(int64_t d, int64_t dv) : q(TILE_Q * d), scores(TILE_Q * LEAD), out(TILE_Q * dv) {}
};

struct Kernel {
  const Problem& p;
  const Packed &keys, &values;  // along, across
  bool wants_raw;

  // Scores of one row to probabilities, columns [r0, r1) of the panels [begin, end); the rest become 0.
  void soften(Tile& t, int64_t j, float* s, int begin, int end, int r0, int r1) const {
    if (p.softcap > 0) cap(t, s, begin, end, r0, r1);
    vf top = splat(-INFINITY);
    int c = begin;
    for (; c < end; c += VL) {
      vf x = load(s + c);
      if (c < r0 || c + VL > r1) {
        x = inside(c, r0, r1) ? x : splat(-INFINITY);
        store(s + c, x);
      }
      top = vmax(top, x);
    }
    float new_top = largest(top);
    if (new_top > t.top[j]) {
      float shrink = std::exp2(t.top[j] - new_top);
      t.top[j] = new_top;
      t.total[j] *= shrink;
      float* o = t.out + j * values.columns;
      for (int64_t e = 0; e < values.columns; e += VL) store(o + e, load(o + e) * shrink);
    }
    vf minus_top = splat(-t.top[j]), total{};
    for (c = begin; c < end; c += VL) {
      vf e = exp2v(load(s + c) + minus_top);
      total += e;
      store(s + c, e);
    }
    t.total[j] += sum(total);
  }

  void cap(Tile& t, float* s, int begin, int end, int r0, int r1) const {
    vf raw = splat(-INFINITY);
    for (int c = begin; c < end; c += VL) {
      vf x = load(s + c);
      raw = vmax(raw, inside(c, r0, r1) ? x : splat(-INFINITY));
      store(s + c, tanhv(x * (LN2 / p.softcap)) * (p.softcap * LOG2E));
    }
    if (wants_raw) t.raw_top = std::max(t.raw_top, largest(raw));
  }

  void attend(Tile& t, const Band& band, int64_t q0, int64_t q1, int64_t kv_head) const {
    int64_t a = std::max(band.q0, q0), b = std::min(band.q1, q1);
    int64_t first = std::max(band.k0, a + band.lo), last = std::min(band.k1, b + band.hi);
    Strip strips[TILE_Q / MR];
    for (int64_t kb = first / BLOCK_K * BLOCK_K; kb < last; kb += BLOCK_K) {
      BandBlock block{band, a, b, kb};
      int count = block.strips(strips);
      const float *keys_of_block = keys.head(kv_head) + kb * keys.columns, *values_of_block = values.head(kv_head) + kb * NR;
      each_panel(strips, count, [&](int c, const Strip& s) {
        multiply<false>(s.rows, (int)p.d, t.q + (s.row - q0) * p.d, p.d, 1, keys_of_block + c * keys.columns,
                        t.scores + (s.row - q0) * LEAD + c, LEAD);
      });
      for (int i = 0; i < count; i++)
        for (int r = 0; r < strips[i].rows; r++) soften_row(t, block, strips[i], strips[i].row + r, q0);
      for (int64_t c = 0; c < values.columns; c += NR)
        for (int i = 0; i < count; i++) {
          const Strip& s = strips[i];
          multiply<true>(s.rows, s.end - s.begin, t.scores + (s.row - q0) * LEAD + s.begin, LEAD, 1,
                         values_of_block + c * values.tokens + s.begin * NR, t.out + (s.row - q0) * values.columns + c, values.columns);
        }
    }
  }

  void soften_row(Tile& t, const BandBlock& block, const Strip& s, int64_t r, int64_t q0) const {
    float* row = t.scores + (r - q0) * LEAD;
    int r0 = std::max(block.left(r), s.begin), r1 = std::min(block.right(r), s.end);
    if (r0 >= r1) std::fill(row + s.first(), row + s.last(), 0.f);
    else soften(t, r - q0, row, s.first(), s.last(), r0, r1);
  }
};

// The larger; NaN where one is.
float larger(float a, float b) { return a > b || std::isnan(a) ? a : b; }

// Of the rows' logits, times log2 e. A NaN among them is in its row's total.
float top_of(const Tile& t, bool capped) {
  float top = capped ? t.raw_top : -INFINITY;
  for (int j = 0; j < TILE_Q; j++) top = larger(top, std::isnan(t.total[j]) ? t.total[j] : capped ? -INFINITY : t.top[j]);
  return top;
}

template <class T>
void finish(const Problem& p, const ForwardOutput& o, const Tile& t, int64_t q0, int64_t q1, int64_t h, int64_t columns) {
  for (int64_t r = q0; r < q1; r++) {
    int64_t j = r - q0, at = r * p.hq + h;
    const float* src = t.out + j * columns;
    bool any = t.total[j] != 0;
    float lse = any ? (t.top[j] + std::log2(t.total[j])) * LN2 : -INFINITY, weight = any ? 1.f / t.total[j] : 0.f;
    if (o.merge) {
      float *dst = o.out_wide + at * p.dv, before = o.lse[at];
      if (!any) continue;
      float merged = std::max(before, lse) + std::log1p(std::exp(-std::abs(before - lse)));
      float keep = std::exp(before - merged);
      weight *= std::exp(lse - merged);
      for (int64_t c = 0; c < p.dv; c++) dst[c] = dst[c] * keep + src[c] * weight;
      o.lse[at] = merged;
      continue;
    }
    o.lse[at] = lse;
    if (o.out_wide)
      for (int64_t c = 0; c < p.dv; c++) o.out_wide[at * p.dv + c] = src[c] * weight;
    else
      for (int64_t c = 0; c < p.dv; c++) narrow(src[c] * weight, (T*)o.out_narrow + at * p.dv + c);
  }
}

template <class T>
void run(const Problem& p, const ForwardOutput& o) {
  int64_t k_tokens = ceil_div(p.num_k, NR) * NR, columns = ceil_div(p.dv, NR) * NR;
  Packed keys(k_tokens, p.d, p.hk), values(k_tokens, columns, p.hk);
  pack_along<T>(p.k, p.num_k, p.d, 1.f, keys, p.threads);
  pack_across<T>(p.v, p.num_k, p.dv, 1.f, values, p.threads);
  Kernel kernel{p, keys, values, o.max_logits && p.softcap > 0};
  TileBands index(p, true, TILE_Q);
  int64_t tiles = ceil_div(p.num_q, TILE_Q), count = tiles * p.hq;

  // Longest tiles first, the heads of one kv head together.
  std::vector<int64_t> work(tiles, 0), order(tiles);
  for (int64_t t = 0; t < tiles; t++) {
    order[t] = t;
    for (int64_t x = index.first[t]; x < index.first[t + 1]; x++) {
      const Band& b = p.bands[index.list[x]];
      work[t] += std::min(b.k1, (t + 1) * TILE_Q + b.hi) - std::max(b.k0, t * TILE_Q + b.lo);
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return work[x] > work[y]; });

  std::vector<float> tops(o.max_logits ? count : 0, -INFINITY);
  std::vector<std::unique_ptr<Tile>> scratch(std::min<int64_t>(p.threads, count));
  for (auto& t : scratch) t = std::make_unique<Tile>(p.d, columns);
  parallel(count, p.threads, [&](int64_t task, int worker) {
    Tile& t = *scratch[worker];
    int64_t tile = order[task / p.hq], h = task % p.hq, q0 = tile * TILE_Q, q1 = std::min(q0 + TILE_Q, p.num_q);
    for (int64_t r = q0; r < q1; r++) {
      const T* src = row_of<T>(p.q, r, h);
      for (int64_t c = 0; c < p.d; c++) t.q[(r - q0) * p.d + c] = widen(src[c]) * (p.scale * LOG2E);
    }
    std::fill(t.out + 0, t.out + TILE_Q * columns, 0.f);
    std::fill(t.top, t.top + TILE_Q, -INFINITY);
    std::fill(t.total, t.total + TILE_Q, 0.f);
    t.raw_top = -INFINITY;
    for (int64_t x = index.first[tile]; x < index.first[tile + 1]; x++)
      kernel.attend(t, p.bands[index.list[x]], q0, q1, h / (p.hq / p.hk));
    finish<T>(p, o, t, q0, q1, h, columns);
    if (o.max_logits) tops[task] = top_of(t, p.softcap > 0) * LN2;
  });
  if (o.max_logits) {
    if (!o.merge) std::fill(o.max_logits, o.max_logits + p.hq, -INFINITY);
    for (int64_t task = 0; task < count; task++) o.max_logits[task % p.hq] = larger(o.max_logits[task % p.hq], tops[task]);
  }
}

}  // namespace

void forward(const Problem& p, const ForwardOutput& o) {
  if (p.dtype == 0) run<float>(p, o);
  else if (p.dtype == 1) run<bf16>(p, o);
  else run<fp16>(p, o);
}
