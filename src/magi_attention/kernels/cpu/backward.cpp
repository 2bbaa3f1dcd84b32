// Backward: five products for each tile of queries and block of keys (Dao et al. 2022, algorithm 4). A unit of work is one kv head and one
// partition of its keys. Partitions are fixed by the problem, not by the threads, and dq is the sum of theirs, in order.
#include <algorithm>
#include <memory>
#include <new>

#include "attention.h"
#include "bands.h"
#include "pack.h"
#include "partition.h"

namespace {

// A block of keys and a tile of queries, packed; a tile's scores become probabilities, and gradients of probabilities those of scores, in place:
//
//                           scores                     dscores
//   one float a word        P                          dS
//   pairs, for two rows     P of both, in pairs        dS of the first, as a left side
//                           dS of both, in pairs       dS of the second
template <class E>
struct Scratch {
  Columns<E> in, out;  // columns of q and k, of v and dout
  Buffer rows, k_along, v_along, k_across, q_rows, dout_rows, q_across, dout_across, scores, dscores, dq, dk, dv;
  Scratch(int64_t d, int64_t d_out)
      : in(d), out(d_out), rows(BLOCK_K * std::max(in.stride, out.stride)), k_along(BLOCK_K * in.stride), v_along(BLOCK_K * out.stride),
        k_across(BLOCK_K / E::n * in.padded), q_rows(TILE_Q * in.stride), dout_rows(TILE_Q * out.stride), q_across(TILE_Q / E::n * in.padded),
        dout_across(TILE_Q / E::n * out.padded), scores(TILE_Q * LEAD), dscores(TILE_Q * LEAD), dq(TILE_Q * in.padded), dk(BLOCK_K * in.padded),
        dv(BLOCK_K * out.padded) {}
  const float* probs_across() const { return scores; }
  const float* dscores_across() const { return E::n == 1 ? dscores : scores + LEAD; }
};

template <class T, class D, class E>
struct Kernel {
  const Problem& p;
  const BackwardInput& in;
  const TileBands& index;  // by block of keys
  const Partitions& parts;
  const Scratch<E>& s;

  // One row of a tile, while its scores are differentiated.
  struct Row {
    vf minus_lse, delta;
    int r0, r1;  // the columns that it attends
  };

  Row row_of_tile(const BandBlock& block, int64_t r, int64_t h) const {
    if (r < block.a || r >= block.b) return {vf{}, vf{}, 0, 0};
    int64_t at = r * p.hq + h;
    bool any = in.lse[at] != -INFINITY;
    return {splat(-in.lse[at] * LOG2E), splat(in.delta[at] * p.scale), any ? block.left(r) : 0, any ? block.right(r) : 0};
  }

  struct Gradient { vf prob, dscore; };

  // Of VL scores and gradients of probabilities; dscore is times the scale, as dq and dk need it.
  template <bool PARTIAL>
  Gradient differentiate(const Row& row, int c, vf score, vf dprob) const {
    vf logit, slope = splat(1.f);
    if (p.softcap > 0) {
      vf t = tanhv(score * (p.scale / p.softcap));
      logit = t * (p.softcap * LOG2E) + row.minus_lse;
      slope = 1.f - t * t;
    } else {
      logit = score * (p.scale * LOG2E) + row.minus_lse;
    }
    vf prob = exp2v(logit), dscore = prob * (dprob * p.scale - row.delta);
    if (p.softcap > 0) dscore = dscore * slope;
    if (PARTIAL) {
      vi attended = inside(c, row.r0, row.r1);
      prob = attended ? prob : vf{}, dscore = attended ? dscore : vf{};
    }
    return {prob, dscore};
  }

  // E::n rows from row r of a tile whose memory begins at row `base`; columns [begin, end), whole vectors.
  void differentiate_rows(const BandBlock& block, int64_t base, int64_t r, int64_t h, int begin, int end) const {
    float *score = s.scores + (r - base) * LEAD, *dscore = s.dscores + (r - base) * LEAD;
    Row row[E::n];
    for (int i = 0; i < E::n; i++) row[i] = row_of_tile(block, r + i, h);
    int full_begin = end, full_end = begin;
    for (int i = 0; i < E::n; i++) {
      full_begin = i ? std::max(full_begin, row[i].r0) : row[i].r0;
      full_end = i ? std::min(full_end, row[i].r1) : row[i].r1;
    }
    auto act = [&](int c, auto partial) {
      Gradient x[E::n];
      for (int i = 0; i < E::n; i++) x[i] = differentiate<partial>(row[i], c, load(score + i * LEAD + c), load(dscore + i * LEAD + c));
      for (int i = 0; i < E::n; i++) E::put(dscore + i * LEAD, c, x[i].dscore);
      if constexpr (E::n == 1) {
        store(score + c, x[0].prob);
      } else {
        store(score + c, E::zip(x[0].prob, x[1].prob));
        store(score + LEAD + c, E::zip(x[0].dscore, x[1].dscore));
      }
    };
    full_begin = std::min(end, (full_begin + VL - 1) / VL * VL), full_end = full_end / VL * VL;
    int c = begin;
    for (; c < full_begin; c += VL) act(c, std::true_type{});
    for (; c < full_end; c += VL) act(c, std::false_type{});
    for (; c < end; c += VL) act(c, std::true_type{});
    // Strips of keys look at a row up to MR - 1 columns (in pairs, one more) away from what it attends: there it is 0.
    constexpr int around = (MR + VL) / VL * VL;
    for (int i = 0; i < E::n; i++)
      for (float* x : {score + i * LEAD, dscore + i * LEAD}) {
        if (E::n == 2 && x == dscore + i * LEAD) continue;
        std::fill(x + std::max(0, begin - around), x + begin, 0.f);
        std::fill(x + end, x + std::min(BLOCK_K, end + around), 0.f);
      }
  }

  // A tile of queries of one head against the packed block of keys.
  void tile(const BandBlock& block, const Strip* strips, int count, int64_t h) const {
    int64_t base = block.a / E::n * E::n, skipped = block.a - base;
    copy_rows<T, E>(p.q, block.a, block.b, h, 1, s.in, s.q_rows + skipped * s.in.stride, 0);
    copy_rows<D, E>(in.dout, block.a, block.b, h, 1, s.out, s.dout_rows + skipped * s.out.stride, 0);
    pack_across<E>(s.q_rows, s.in, TILE_Q, (int)skipped, (int)(block.b - base), s.q_across);
    pack_across<E>(s.dout_rows, s.out, TILE_Q, (int)skipped, (int)(block.b - base), s.dout_across);
    int64_t part = parts.of_block(block.kb / BLOCK_K);
    for (int64_t r = block.a; r < block.b; r++) prefetch<1>(parts.dq_row(part, r, h), p.d * sizeof(float));
    auto along = [&](const float* rows, const Columns<E>& columns, const float* panels, float* to) {
      each_panel(strips, count, [&](int c, int vectors, const Strip& x) {
        multiply<E, false>(x.rows, vectors, (int)columns.words, rows + (x.row - base) * columns.stride, columns.stride, 1,
                           panels + c / NR * NR * columns.stride + c % NR, to + (x.row - base) * LEAD + c, LEAD);
      });
    };
    along(s.q_rows, s.in, s.k_along, s.scores);
    along(s.dout_rows, s.out, s.v_along, s.dscores);
    for (int i = 0; i < count; i++)
      for (int64_t r = strips[i].row / E::n * E::n; r < strips[i].row + strips[i].rows; r += E::n)
        differentiate_rows(block, base, r, h, strips[i].first(), strips[i].last());
    to_queries(base, strips, count, h, part);
    to_keys(s.probs_across(), s.dout_across, s.out, s.dv, block, base, strips, count);
    to_keys(s.dscores_across(), s.q_across, s.in, s.dk, block, base, strips, count);
  }

  // dq += dS K.
  void to_queries(int64_t base, const Strip* strips, int count, int64_t h, int64_t part) const {
    int64_t a = strips[0].row, b = strips[count - 1].row + strips[count - 1].rows;
    float* dq = s.dq + (a - base) * s.in.padded;
    std::fill(dq, dq + (b - a) * s.in.padded, 0.f);
    for (int64_t c = 0; c < s.in.padded; c += NR)
      for (int i = 0; i < count; i++) {
        const Strip& x = strips[i];
        add_product<E>(x.rows, s.in.vectors(c), x.begin, x.end, s.dscores + (x.row - base) * LEAD, LEAD, 1,
                       s.k_across + c * (BLOCK_K / E::n), dq + (x.row - a) * s.in.padded + c, s.in.padded);
      }
    for (int64_t r = a; r < b; r++, dq += s.in.padded) {
      float* dst = parts.dq_row(part, r, h);
      for (int64_t e = 0; e < p.d; e++) dst[e] += dq[e];
    }
  }

  // sums [keys, columns] += weights^T [keys, queries] rows [queries, columns], over the queries of the tile's strips.
  void to_keys(const float* weights, const float* rows, const Columns<E>& columns, float* sums, const BandBlock& block, int64_t base,
               const Strip* strips, int count) const {
    const Band& band = block.band;
    int key_begin = block.left(block.a), key_end = block.right(block.b - 1);
    int64_t a = strips[0].row, b = strips[count - 1].row + strips[count - 1].rows;
    for (int64_t e = 0; e < columns.padded; e += NR)
      for (int c = key_begin; c < key_end; c += MR) {
        int num = std::min(MR, key_end - c);
        int64_t from = std::max(a, block.kb + c - band.hi), to = std::min(b, block.kb + c + num - band.lo);
        if (from < to)
          add_product<E>(num, columns.vectors(e), from - base, to - base, weights + c, 1, E::n * LEAD, rows + e * (TILE_Q / E::n),
                         sums + c * columns.padded + e, columns.padded);
      }
  }

  // All queries against one block of keys.
  void block(int64_t number, int64_t kv) const {
    int64_t kb = number * BLOCK_K, group = p.hq / p.hk, end = std::min(kb + BLOCK_K, p.num_k);
    int first = BLOCK_K, last = 0;
    each_tile(number, [&](const BandBlock& x, const Strip*, int) {
      first = std::min(first, x.left(x.a)), last = std::max(last, x.right(x.b - 1));
    });
    std::fill(s.dk + 0, s.dk + BLOCK_K * s.in.padded, 0.f);
    std::fill(s.dv + 0, s.dv + BLOCK_K * s.out.padded, 0.f);
    if (first < last) {
      copy_rows<T, E>(p.k, kb + first, kb + last, kv, 1, s.in, s.rows + first * s.in.stride, 0);
      pack_along<E>(s.rows, s.in, first, last, s.k_along);
      pack_across<E>(s.rows, s.in, BLOCK_K, first, last, s.k_across);
      copy_rows<T, E>(p.v, kb + first, kb + last, kv, 1, s.out, s.rows + first * s.out.stride, 0);
      pack_along<E>(s.rows, s.out, first, last, s.v_along);
    }
    each_tile(number, [&](const BandBlock& x, const Strip* strips, int count) {
      for (int64_t g = 0; g < group; g++) tile(x, strips, count, kv * group + g);
    });
    for (int64_t c = kb; c < end; c++) {
      write(s.dk + (c - kb) * s.in.padded, p.d, in.dk, c * p.hk + kv);
      write(s.dv + (c - kb) * s.out.padded, p.dv, in.dv, c * p.hk + kv);
    }
  }

  void write(const float* from, int64_t columns, void* to, int64_t row) const {
    if (in.narrow) narrow_row(from, columns, (T*)to + row * columns);
    else narrow_row(from, columns, (float*)to + row * columns);
  }

  // act(band cut to tile and block, its strips, their number), where there are any.
  template <class Act>
  void each_tile(int64_t number, Act&& act) const {
    int64_t kb = number * BLOCK_K;
    for (int64_t at = index.first[number]; at < index.first[number + 1]; at++) {
      const Band& band = p.bands[index.list[at]];
      Range q = queries_of(p, band, number);
      for (int64_t q0 = q.begin / TILE_Q * TILE_Q; q0 < q.end; q0 += TILE_Q) {
        BandBlock block{band, std::max(q.begin, q0), std::min(q.end, q0 + TILE_Q), kb};
        Strip strips[MAX_STRIPS];
        if (int count = block.strips(strips)) act(block, strips, count);
      }
    }
  }
};

template <class T, class D>
void run(const Problem& p, const BackwardInput& in) {
  typedef typename std::conditional<std::is_same<T, D>::value, typename ProductOf<T>::type, Single>::type E;
  TileBands index(p, false, BLOCK_K);
  Partitions parts(p, in, index);
  int64_t units = p.hk * parts.count();
  std::vector<std::unique_ptr<Scratch<E>>> scratch(std::min<int64_t>(p.threads, units));
  for (auto& s : scratch) s = std::make_unique<Scratch<E>>(p.d, p.dv);
  size_t size = in.narrow ? sizeof(T) : 4;
  if (!in.add_to_dq) prefer_large_pages(in.dq, p.num_q * p.hq * p.d * size);
  prefer_large_pages(in.dk, p.num_k * p.hk * p.d * size);
  prefer_large_pages(in.dv, p.num_k * p.hk * p.dv * size);
  parts.clear();
  parallel(units, p.threads, [&](int64_t unit, int worker) {
    Kernel<T, D, E> kernel{p, in, index, parts, *scratch[worker]};
    Range blocks = parts.blocks(unit / p.hk);
    for (int64_t b = blocks.begin; b < blocks.end; b++) kernel.block(b, unit % p.hk);
  });
  parts.add_up<T>();
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
