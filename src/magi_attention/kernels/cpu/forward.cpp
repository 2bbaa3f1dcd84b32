// Forward: online softmax over blocks of keys (Milakov and Gimelshein 2018; Dao et al. 2022). A task is a stretch of queries and the heads that
// share one head of keys: each block of keys and values that it attends is packed once for all of them.
#include <algorithm>
#include <memory>
#include <new>

#include "attention.h"
#include "bands.h"
#include "pack.h"

namespace {

constexpr size_t STREAMED = 8 << 20;    // bytes of an output that is written past the caches: it would not stay there anyway
constexpr int64_t ROWS_WANTED = 480;  // queries x heads of a stretch: they pay for packing, and their outputs stay in the caches

// One tile of a stretch against one block of keys, by one band.
struct Job { int32_t block, tile; int64_t band; };

// What a worker needs for a stretch. Rows of queries are (head of the group, query); logits are in units of log 2.
struct Scratch {
  Buffer rows, keys, values, q, scores, out, top, total, sums, raw_top;  // total: VL partial sums a row, of which sums are made
  std::vector<Job> jobs;
  template <class E>
  Scratch(const Columns<E>& k, const Columns<E>& v, int64_t group, int64_t queries, int64_t max_jobs)
      : rows(BLOCK_K * std::max(k.stride, v.stride)), keys(BLOCK_K * k.stride), values(BLOCK_K / E::n * v.padded),
        q(group * TILE_Q * k.stride), scores(TILE_Q * LEAD), out(group * queries * v.padded), top(group * queries),
        total((group * queries + VL) * VL), sums(group * queries + VL), raw_top(group * queries) {
    jobs.reserve(max_jobs);
  }
};

// The larger; NaN where one is.
float larger(float a, float b) { return a > b || std::isnan(a) ? a : b; }

template <class T>
struct Kernel {
  typedef typename ProductOf<T>::type E;
  const Problem& p;
  const ForwardOutput& o;
  const TileBands& index;
  int64_t tiles_wanted;  // of a stretch
  bool streams;
  Columns<E> k_columns{p.d}, v_columns{p.dv};

  int64_t group() const { return p.hq / p.hk; }
  int64_t stretches() const { return ceil_div(p.num_q, tiles_wanted * TILE_Q); }

  // act(job) for all jobs of a stretch.
  template <class Act>
  void each_job(int64_t stretch, Act&& act) const {
    int64_t begin = stretch * tiles_wanted, end = std::min(begin + tiles_wanted, ceil_div(p.num_q, TILE_Q));
    for (int64_t tile = begin; tile < end; tile++)
      for (int64_t x = index.first[tile]; x < index.first[tile + 1]; x++) {
        const Band& b = p.bands[index.list[x]];
        int64_t first = std::max(b.q0, tile * TILE_Q), last = std::min(b.q1, (tile + 1) * TILE_Q);
        int64_t k_end = std::min(b.k1, last + b.hi);
        for (int64_t block = std::max(b.k0, first + b.lo) / BLOCK_K; block * BLOCK_K < k_end; block++)
          act(Job{(int32_t)block, (int32_t)(tile - begin), index.list[x]});
      }
  }

  // A stretch and the heads of one kv head.
  struct Stretch {
    const Kernel& kernel;
    Scratch& s;
    int64_t q0, q1, kv;

    int64_t row_of_head(int64_t g) const { return g * (q1 - q0); }
    BandBlock cut(const Job& job) const {
      const Band& band = kernel.p.bands[job.band];
      int64_t begin = q0 + job.tile * TILE_Q;
      return {band, std::max(band.q0, begin), std::min({band.q1, begin + TILE_Q, q1}), (int64_t)job.block * BLOCK_K};
    }

    void run(int64_t stretch) const {
      const auto& k = kernel;
      int64_t rows = k.group() * (q1 - q0);
      std::fill(s.out + 0, s.out + rows * k.v_columns.padded, 0.f);
      std::fill(s.top + 0, s.top + rows, -INFINITY);
      std::fill(s.raw_top + 0, s.raw_top + rows, -INFINITY);
      std::fill(s.total + 0, s.total + rows * VL, 0.f);
      s.jobs.clear();
      k.each_job(stretch, [&](const Job& job) { s.jobs.push_back(job); });
      std::sort(s.jobs.begin(), s.jobs.end(), [](const Job& x, const Job& y) {
        return std::tie(x.block, x.tile, x.band) < std::tie(y.block, y.tile, y.band);
      });
      for (size_t first = 0, last; first < s.jobs.size(); first = last) {
        int begin = BLOCK_K, end = 0;
        for (last = first; last < s.jobs.size() && s.jobs[last].block == s.jobs[first].block; last++) {
          BandBlock block = cut(s.jobs[last]);
          begin = std::min(begin, block.left(block.a)), end = std::max(end, block.right(block.b - 1));
        }
        if (begin >= end) continue;
        pack(s.jobs[first].block * (int64_t)BLOCK_K, begin, end);
        for (size_t i = first; i < last; i++) attend(cut(s.jobs[i]));
      }
      for (int64_t j = 0; j < rows; j += VL) store(s.sums + j, sums_of(s.total + j * VL));
      for (int64_t r = q0; r < q1; r++)
        for (int64_t g = 0; g < k.group(); g++) finish(r, kv * k.group() + g, row_of_head(g) + r - q0);
      finish_streams();
    }

    void pack(int64_t kb, int begin, int end) const {
      const auto& k = kernel;
      auto rows_of = [&](const View& x, const Columns<E>& columns) {
        copy_rows<T, E>(x, kb + begin, kb + end, kv, 1, columns, s.rows + begin * columns.stride, 0);
        return s.rows + 0;
      };
      pack_along<E>(rows_of(k.p.k, k.k_columns), k.k_columns, begin, end, s.keys);
      pack_across<E>(rows_of(k.p.v, k.v_columns), k.v_columns, BLOCK_K, begin, end, s.values);
    }

    void attend(const BandBlock& block) const {
      const auto& k = kernel;
      const Columns<E>&in = k.k_columns, &out = k.v_columns;
      Strip strips[MAX_STRIPS];
      int count = block.strips(strips);
      if (!count) return;
      auto scores = [&](int64_t row) { return s.scores + (row - block.a) * LEAD; };
      int64_t apart = TILE_Q * in.stride;
      copy_rows<T, E>(k.p.q, block.a, block.b, kv * k.group(), k.group(), in, s.q, apart);
      for (int64_t g = 0; g < k.group(); g++) {
        int64_t to = row_of_head(g) - q0;
        each_panel(strips, count, [&](int c, int vectors, const Strip& x) {
          multiply<E, false>(x.rows, vectors, (int)in.words, s.q + g * apart + (x.row - block.a) * in.stride, in.stride, 1,
                             s.keys + c / NR * NR * in.stride + c % NR, scores(x.row) + c, LEAD);
        });
        for (int i = 0; i < count; i++) {
          const Strip& x = strips[i];
          // All rows' maxima before the first exponential: a maximum takes long, but not many of the processor's units.
          for (int64_t r = x.row; r < x.row + x.rows; r++) raise_top(to + r, scores(r), block.left(r), block.right(r));
          for (int64_t r = x.row; r < x.row + x.rows; r++)
            soften(to + r, scores(r), x.first(), x.last(), block.left(r), block.right(r));
        }
        for (int64_t c = 0; c < out.padded; c += NR)
          for (int i = 0; i < count; i++) {
            const Strip& x = strips[i];
            add_product<E>(x.rows, out.vectors(c), x.begin, x.end, scores(x.row), LEAD, 1, s.values + c * (BLOCK_K / E::n),
                           s.out + (to + x.row) * out.padded + c, out.padded);
          }
      }
    }

    // Scores of one row, columns [r0, r1), to logits, in place; the others of the vectors that hold these become -inf.
    void raise_top(int64_t j, float* row, int r0, int r1) const {
      const Problem& p = kernel.p;
      if (r0 >= r1) return;
      float factor = p.scale * LOG2E;
      if (p.softcap > 0) {
        cap(j, row, r0, r1);
        factor = LOG2E;
      }
      vf highest = splat(-INFINITY);
      each_vector(r0, r1, [&](int c, auto partial) {
        vf x = load(row + c) * factor;
        if (partial) x = inside(c, r0, r1) ? x : splat(-INFINITY);
        store(row + c, x);  // rounded: the largest less itself must be 0
        highest = vmax(highest, x);
      });
      float top = largest(highest), before = s.top[j];
      if (!(top > before)) return;
      s.top[j] = top;
      if (before == -INFINITY) return;
      float shrink = std::exp2(before - top), *total = s.total + j * VL, *out = s.out + j * kernel.v_columns.padded;
      store(total, load(total) * shrink);
      for (int64_t e = 0; e < kernel.v_columns.padded; e += VL) store(out + e, load(out + e) * shrink);
    }

    // Logits of one row to probabilities, in place, as words: columns [r0, r1) of [begin, end); the rest become 0.
    void soften(int64_t j, float* row, int begin, int end, int r0, int r1) const {
      if (r0 >= r1) r0 = r1 = end;
      vf top = splat(s.top[j]), sums = load(s.total + j * VL);
      int c = begin;
      for (; c < r0 / VL * VL; c += VL) E::put(row, c, vf{});
      for (; c < r1; c += VL) {
        vf e = exp2v(load(row + c) - top);
        sums += e;
        E::put(row, c, e);
      }
      for (; c < end; c += VL) E::put(row, c, vf{});
      store(s.total + j * VL, sums);
    }

    void cap(int64_t j, float* row, int r0, int r1) const {
      const Problem& p = kernel.p;
      vf raw = splat(-INFINITY);
      for (int c = r0 / VL * VL; c < r1; c += VL) {
        vf x = load(row + c) * p.scale;
        raw = vmax(raw, inside(c, r0, r1) ? x : splat(-INFINITY));
        store(row + c, tanhv(x * (1.f / p.softcap)) * p.softcap);
      }
      s.raw_top[j] = std::max(s.raw_top[j], largest(raw) * LOG2E);
    }

    void finish(int64_t r, int64_t h, int64_t j) const {
      const Problem& p = kernel.p;
      const ForwardOutput& o = kernel.o;
      int64_t at = r * p.hq + h;
      const float* src = s.out + j * kernel.v_columns.padded;
      float total = s.sums[j];
      bool any = total != 0;
      float lse = any ? (s.top[j] + std::log2(total)) * LN2 : -INFINITY, weight = any ? 1.f / total : 0.f;
      if (o.merge) {
        float *dst = o.out_wide + at * p.dv, before = o.lse[at];
        if (!any) return;
        float merged = std::max(before, lse) + std::log1p(std::exp(-std::abs(before - lse)));
        float keep = std::exp(before - merged);
        weight *= std::exp(lse - merged);
        for (int64_t c = 0; c < p.dv; c++) dst[c] = dst[c] * keep + src[c] * weight;
        o.lse[at] = merged;
        return;
      }
      o.lse[at] = lse;
      if (o.out_wide) write(src, weight, o.out_wide + at * p.dv);
      else write(src, weight, (T*)o.out_narrow + at * p.dv);
    }

    template <class Out>
    void write(const float* src, float weight, Out* dst) const {
      constexpr int64_t in_line = LINE / sizeof(Out);
      int64_t dv = kernel.p.dv;
      if (!kernel.streams) {
        for (int64_t c = 0; c < dv; c++) narrow(src[c] * weight, dst + c);
        return;
      }
      for (int64_t c = 0; c < dv; c += in_line) {
        Out line[in_line];
        for (int64_t i = 0; i < in_line; i++) narrow(src[c + i] * weight, line + i);
        stream_line(dst + c, line);
      }
    }

    // The largest logit of a head, times log2 e, before the softcap. A NaN among them is in its row's total.
    float top_of(int64_t g) const {
      float top = -INFINITY;
      bool capped = kernel.p.softcap > 0;
      for (int64_t j = row_of_head(g); j < row_of_head(g + 1); j++) {
        float total = s.sums[j];
        top = larger(top, std::isnan(total) ? total : capped ? s.raw_top[j] : s.top[j]);
      }
      return top;
    }
  };
};

// Results do not depend on how long stretches are: where there are few for the threads, they are shorter.
int64_t tiles_of_a_stretch(const Problem& p) {
  int64_t tiles = std::max<int64_t>(1, ROWS_WANTED / (p.hq / p.hk) / TILE_Q);
  while (tiles > 1 && ceil_div(p.num_q, tiles * TILE_Q) * p.hk < 8 * p.threads) tiles = (tiles + 1) / 2;
  return tiles;
}

template <class T>
void run(const Problem& p, const ForwardOutput& o) {
  TileBands index(p, true, TILE_Q);
  void* out = o.out_wide ? o.out_wide : o.out_narrow;
  size_t row = p.dv * (o.out_wide ? sizeof(float) : sizeof(T)), size = p.num_q * p.hq * row;
  Kernel<T> kernel{p, o, index, tiles_of_a_stretch(p), row % LINE == 0 && (uintptr_t)out % LINE == 0 && size >= STREAMED};
  int64_t stretches = kernel.stretches(), count = stretches * p.hk, group = kernel.group();

  // Longest stretches first, the kv heads of one together.
  std::vector<int64_t> work(stretches, 0), order(stretches);
  for (int64_t i = 0; i < stretches; i++) {
    order[i] = i;
    kernel.each_job(i, [&](const Job&) { work[i]++; });
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return work[x] > work[y]; });

  if (!o.merge) prefer_large_pages(out, size);
  int64_t queries = kernel.tiles_wanted * TILE_Q;
  std::vector<float> tops(o.max_logits ? stretches * p.hq : 0, -INFINITY);
  std::vector<std::unique_ptr<Scratch>> scratch(std::min<int64_t>(p.threads, count));
  for (auto& s : scratch) s = std::make_unique<Scratch>(kernel.k_columns, kernel.v_columns, group, queries, work[order[0]]);
  parallel(count, p.threads, [&](int64_t task, int worker) {
    int64_t i = order[task / p.hk], q0 = i * queries;
    typename Kernel<T>::Stretch stretch{kernel, *scratch[worker], q0, std::min(q0 + queries, p.num_q), task % p.hk};
    stretch.run(i);
    if (o.max_logits)
      for (int64_t g = 0; g < group; g++) tops[i * p.hq + stretch.kv * group + g] = stretch.top_of(g) * LN2;
  });
  if (o.max_logits) {
    if (!o.merge) std::fill(o.max_logits, o.max_logits + p.hq, -INFINITY);
    for (int64_t i = 0; i < stretches * p.hq; i++) o.max_logits[i % p.hq] = larger(o.max_logits[i % p.hq], tops[i]);
  }
}

}  // namespace

void forward(const Problem& p, const ForwardOutput& o) {
  if (p.dtype == 0) run<float>(p, o);
  else if (p.dtype == 1) run<bf16>(p, o);
  else run<fp16>(p, o);
}
