// Backward: five products for each tile of 60 queries x 256 keys (Dao et al. 2022, algorithm 4). A unit of work is one kv head and one
// partition of its keys; partitions are fixed by the problem, not by the threads, and dq is the sum of theirs, in order.
#include <algorithm>
#include <memory>
#include <new>

#include "attention.h"
#include "pack.h"

namespace {

constexpr int64_t UNITS_WANTED = 8;  // kv heads x partitions: enough to balance a few threads, few enough to bound the dq buffers

struct Scratch {
  Buffer probs, dscores, dk, dv;  // scores become probs, and dprobs dscores, in place
  Scratch(int64_t d, int64_t dv_columns) : probs(TILE_Q * LEAD), dscores(TILE_Q * LEAD), dk(BLOCK_K * d), dv(BLOCK_K * dv_columns) {}
};

struct Operands {
  // q and dout in rows; k (scaled by scale * log2 e) and v along tokens, for S and dP; k, q and dout across, for dQ, dK and dV.
  const Rows &q_rows, &dout_rows;
  const Packed &k_along, &v_along, &k_across, &q_across, &dout_across;
};

struct Kernel {
  const Problem& p;
  const BackwardInput& in;
  const Operands& x;

  // Scores and gradients of probabilities of one row, in place, to probabilities and gradients of scores: columns [begin, end), of which
  // [r0, r1) are attended; the others become 0.
  void differentiate(float* prob, float* dscore, int64_t at, int begin, int end, int r0, int r1) const {
    vf minus_lse = splat(-in.lse[at] * LOG2E), delta = splat(in.delta[at]);
    if (in.lse[at] == -INFINITY) r1 = r0;
    for (int c = begin; c < end; c += VL) {
      vf logit = load(prob + c), slope = splat(1.f);
      if (p.softcap > 0) {
        vf t = tanhv(logit * (LN2 / p.softcap));
        logit = t * (p.softcap * LOG2E);
        slope = 1.f - t * t;
      }
      vf e = exp2v(logit + minus_lse);
      if (c < r0 || c + VL > r1) e = inside(c, r0, r1) ? e : vf{};
      store(prob + c, e);
      vf ds = e * (load(dscore + c) - delta);
      store(dscore + c, p.softcap > 0 ? ds * slope : ds);
    }
  }

  // One tile of queries [a, b) of one head against a block of keys.
  void tile(const Scratch& s, const BandBlock& block, int64_t h, int64_t kv, float* dq) const {
    Strip strips[TILE_Q / MR];
    int count = block.strips(strips);
    if (!count) return;
    int64_t kb = block.kb, d = p.d, dv = p.dv;
    const float *keys = x.k_along.head(kv) + kb * d, *values = x.v_along.head(kv) + kb * dv, *k_across = x.k_across.head(kv) + kb * NR;
    auto place = [&](Buffer const& b, int64_t row) { return b + (row - block.a) * LEAD; };
    each_panel(strips, count, [&](int c, const Strip& r) {
      multiply<false>(r.rows, (int)d, x.q_rows.at(r.row, h), x.q_rows.token, 1, keys + c * d, place(s.probs, r.row) + c, LEAD);
    });
    each_panel(strips, count, [&](int c, const Strip& r) {
      multiply<false>(r.rows, (int)dv, x.dout_rows.at(r.row, h), x.dout_rows.token, 1, values + c * dv, place(s.dscores, r.row) + c, LEAD);
    });
    int key_begin = block.left(block.a), key_end = block.right(block.b - 1);
    for (int i = 0; i < count; i++) {
      const Strip& r = strips[i];
      for (int64_t row = r.row; row < r.row + r.rows; row++) {
        float *prob = place(s.probs, row), *dscore = place(s.dscores, row);
        differentiate(prob, dscore, row * p.hq + h, r.first(), r.last(), block.left(row), block.right(row));
        // Strips of keys below look at whole columns of this tile: what this row does not attend of them is 0.
        clear(prob, dscore, std::max(0, key_begin - MR), r.first());
        clear(prob, dscore, r.last(), std::min(BLOCK_K, key_end + MR));
      }
    }
    for (int64_t c = 0; c < x.k_across.columns; c += NR)
      for (int i = 0; i < count; i++) {
        const Strip& r = strips[i];
        multiply<true>(r.rows, r.end - r.begin, place(s.dscores, r.row) + r.begin, LEAD, 1, k_across + c * x.k_across.tokens + r.begin * NR,
                       dq + r.row * x.k_across.columns + c, x.k_across.columns);
      }
    to_keys(s.probs, s.dv, x.dout_across, block, h, strips, count);
    to_keys(s.dscores, s.dk, x.q_across, block, h, strips, count);
  }

  // sums [keys, columns] += weights^T [keys, queries] rows [queries, columns], over the queries of the tile's strips.
  void to_keys(const Buffer& weights, const Buffer& sums, const Packed& rows, const BandBlock& block, int64_t h, const Strip* strips,
               int count) const {
    const Band& band = block.band;
    int key_begin = block.left(block.a), key_end = block.right(block.b - 1);
    int64_t a = strips[0].row, b = strips[count - 1].row + strips[count - 1].rows;  // strips that attend something are neighbours
    for (int64_t e = 0; e < rows.columns; e += NR)
      for (int c = key_begin; c < key_end; c += MR) {
        int num = std::min(MR, key_end - c);
        int64_t from = std::max(a, block.kb + c - band.hi), to = std::min(b, block.kb + c + num - band.lo);
        if (from < to)
          multiply<true>(num, (int)(to - from), weights + (from - block.a) * LEAD + c, 1, LEAD,
                         rows.head(h) + e * rows.tokens + from * NR, sums + c * rows.columns + e, rows.columns);
      }
  }

  static void clear(float* prob, float* dscore, int begin, int end) {
    if (begin >= end) return;
    std::fill(prob + begin, prob + end, 0.f);
    std::fill(dscore + begin, dscore + end, 0.f);
  }

  // All queries against one block of keys.
  void block(const Scratch& s, const TileBands& index, int64_t number, int64_t kv, float* dq_of_unit, int64_t dq_head) const {
    int64_t kb = number * BLOCK_K, group = p.hq / p.hk, end = std::min(kb + BLOCK_K, p.num_k);
    std::fill(s.dk + 0, s.dk + BLOCK_K * x.q_across.columns, 0.f);
    std::fill(s.dv + 0, s.dv + BLOCK_K * x.dout_across.columns, 0.f);
    for (int64_t at = index.first[number]; at < index.first[number + 1]; at++) {
      const Band& band = p.bands[index.list[at]];
      int64_t k0 = std::max(kb, band.k0), k1 = std::min(end, band.k1);
      int64_t begin = std::max(band.q0, k0 - band.hi), stop = std::min(band.q1, k1 - band.lo);
      for (int64_t g = 0; g < group; g++)
        for (int64_t q0 = begin / TILE_Q * TILE_Q; q0 < stop; q0 += TILE_Q)
          tile(s, {band, std::max(begin, q0), std::min(stop, q0 + TILE_Q), kb}, kv * group + g, kv, dq_of_unit + g * dq_head);
    }
    for (int64_t c = kb; c < end; c++) {
      const float *dk = s.dk + (c - kb) * x.q_across.columns, *dv = s.dv + (c - kb) * x.dout_across.columns;
      for (int64_t e = 0; e < p.d; e++) in.dk[(c * p.hk + kv) * p.d + e] = dk[e] * p.scale;
      for (int64_t e = 0; e < p.dv; e++) in.dv[(c * p.hk + kv) * p.dv + e] = dv[e];
    }
  }
};

// Borders of partitions of the k blocks, of about equal area.
std::vector<int64_t> partition(const Problem& p, const TileBands& index, int64_t blocks, int64_t parts) {
  std::vector<double> work(blocks + 1, 0.0);
  for (int64_t b = 0; b < blocks; b++) {
    double cells = 1;
    for (int64_t x = index.first[b]; x < index.first[b + 1]; x++) {
      const Band& band = p.bands[index.list[x]];
      int64_t k0 = std::max(b * BLOCK_K, band.k0), k1 = std::min((b + 1) * BLOCK_K, band.k1);
      cells += (double)(std::min(band.q1, k1 - band.lo) - std::max(band.q0, k0 - band.hi));
    }
    work[b + 1] = work[b] + cells;
  }
  std::vector<int64_t> borders(parts + 1, blocks);
  for (int64_t i = 0, b = 0; i < parts; i++) {
    while (b < blocks && work[b] < work[blocks] * i / parts) b++;
    borders[i] = b;
  }
  return borders;
}

// The queries [first, last) that attend keys of a partition: only these rows of its dq are ever touched.
struct Reach { int64_t first, last; };

std::vector<Reach> reach_of(const Problem& p, const TileBands& index, const std::vector<int64_t>& borders) {
  std::vector<Reach> reach;
  for (size_t part = 0; part + 1 < borders.size(); part++) {
    Reach r{p.num_q, 0};
    for (int64_t b = borders[part]; b < borders[part + 1]; b++)
      for (int64_t x = index.first[b]; x < index.first[b + 1]; x++) {
        const Band& band = p.bands[index.list[x]];
        int64_t k0 = std::max(b * BLOCK_K, band.k0), k1 = std::min((b + 1) * BLOCK_K, band.k1);
        r.first = std::min(r.first, std::max(band.q0, k0 - band.hi));
        r.last = std::max(r.last, std::min(band.q1, k1 - band.lo));
      }
    reach.push_back(r);
  }
  return reach;
}

void add_partitions(const Problem& p, const BackwardInput& in, const Packed& dq, const std::vector<Reach>& reach, int64_t columns) {
  int64_t group = p.hq / p.hk, parts = (int64_t)reach.size();
  constexpr int64_t block = 64;
  parallel(ceil_div(p.num_q, block), p.threads, [&](int64_t task, int) {
    for (int64_t t = task * block; t < std::min(p.num_q, (task + 1) * block); t++)
      for (int64_t h = 0; h < p.hq; h++) {
        float* dst = in.dq + (t * p.hq + h) * p.d;
        if (!in.add_to_dq) std::fill(dst, dst + p.d, 0.f);
        for (int64_t part = 0; part < parts; part++) {
          if (t < reach[part].first || t >= reach[part].last) continue;
          const float* src = dq.head(((h / group) * parts + part) * group + h % group) + t * columns;
          for (int64_t c = 0; c < p.d; c++) dst[c] += src[c] * p.scale;
        }
      }
  });
}

template <class T, class D>
void run(const Problem& p, const BackwardInput& in) {
  auto padded = [](int64_t n) { return ceil_div(n, NR) * NR; };
  int64_t tq = p.num_q, tk = padded(p.num_k), d = padded(p.d), dv = padded(p.dv), group = p.hq / p.hk;
  Rows q_rows = make_rows<T>(p.q, tq, p.d, p.hq, p.threads), dout_rows = make_rows<D>(in.dout, tq, p.dv, p.hq, p.threads);
  Packed q_across(tq, d, p.hq), dout_across(tq, dv, p.hq);
  Packed k_along(tk, p.d, p.hk), v_along(tk, p.dv, p.hk), k_across(tk, d, p.hk);
  pack_across<T>(p.q, tq, p.d, 1.f, q_across, p.threads);
  pack_across<D>(in.dout, tq, p.dv, 1.f, dout_across, p.threads);
  pack_along<T>(p.k, p.num_k, p.d, p.scale * LOG2E, k_along, p.threads);
  pack_along<T>(p.v, p.num_k, p.dv, 1.f, v_along, p.threads);
  pack_across<T>(p.k, p.num_k, p.d, 1.f, k_across, p.threads);
  Operands operands{q_rows, dout_rows, k_along, v_along, k_across, q_across, dout_across};
  Kernel kernel{p, in, operands};

  TileBands index(p, false, BLOCK_K);
  int64_t blocks = ceil_div(p.num_k, BLOCK_K);
  int64_t parts = std::max<int64_t>(1, std::min(blocks, ceil_div(UNITS_WANTED, p.hk)));
  auto borders = partition(p, index, blocks, parts);
  Packed dq(tq, d, p.hk * parts * group);
  auto reach = reach_of(p, index, borders);
  std::vector<std::unique_ptr<Scratch>> scratch(std::min<int64_t>(p.threads, p.hk * parts));
  for (auto& s : scratch) s = std::make_unique<Scratch>(d, dv);
  parallel(p.hk * parts, p.threads, [&](int64_t unit, int worker) {
    int64_t kv = unit / parts, part = unit % parts;
    float* own_dq = dq.head(unit * group);
    for (int64_t g = 0; g < group && reach[part].first < reach[part].last; g++)
      std::fill(own_dq + g * dq.head_size + reach[part].first * d, own_dq + g * dq.head_size + reach[part].last * d, 0.f);
    for (int64_t b = borders[part]; b < borders[part + 1]; b++) kernel.block(*scratch[worker], index, b, kv, own_dq, dq.head_size);
  });
  add_partitions(p, in, dq, reach, d);
}

template <class T>
void run_for_dout(const Problem& p, const BackwardInput& in) {
  if (in.dout_dtype == 0) run<T, float>(p, in);
  else run<T, T>(p, in);
}

}  // namespace

void backward(const Problem& p, const BackwardInput& in) {
  if (p.dtype == 0) run_for_dout<float>(p, in);
  else if (p.dtype == 1) run_for_dout<bf16>(p, in);
  else run_for_dout<fp16>(p, in);
}
