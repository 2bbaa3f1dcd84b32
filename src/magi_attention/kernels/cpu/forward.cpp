// Forward: online softmax over blocks of keys (Milakov and Gimelshein 2018; Dao et al. 2022). A task is a stretch of queries and the heads that
// share one head of keys: each block of keys and values that it attends is packed once for all of them.
#include <algorithm>
#include <memory>
#include <new>

#include "attention.h"
#include "bands.h"
#include "pack.h"

namespace {

constexpr int64_t ROWS_WANTED = 480;  // of a stretch: they pay for packing, and their outputs stay in the caches
constexpr int64_t PIECE_Q = 60;       // queries of a piece of a stretch

// One piece of a stretch against one block of keys, by one band.
struct Job { int32_t block, piece; int64_t band; };

enum class State : char { EMPTY, SUMS, WRITTEN };

// What a worker needs for a stretch. Logits are in units of log 2.
struct Scratch {
  Buffer k_rows, v_rows, keys, values, q, scores, out, top, total, sums, lse, weights, raw_top;  // total: VL partial sums a row, for sums
  std::vector<State> states;  // of rows of out
  std::vector<Job> jobs;
  template <class E>
  Scratch(const Columns<E>& k, const Columns<E>& v, int64_t rows, int64_t max_jobs)
      : k_rows(BLOCK_K * k.stride), v_rows(BLOCK_K * v.stride), keys(BLOCK_K * k.stride), values(v.across(BLOCK_K)),
        q(TILE_ROWS * k.stride), scores(TILE_ROWS * LEAD), out(rows * v.padded), top(rows + VL), total((rows + VL) * VL), sums(rows + VL),
        lse(rows + VL), weights(rows + VL), raw_top(rows), states(rows) {
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
  const Pieces &pieces, &blocks;  // of queries, of keys
  const PieceBands& index;
  const std::vector<int64_t>& stretches;  // stretch i is pieces [i, i + 1) of these
  bool streams;
  Columns<E> k_columns{p.d}, v_columns{p.dv};

  int group() const { return (int)(p.hq / p.hk); }

  // act(job) for all jobs of a stretch.
  template <class Act>
  void each_job(int64_t stretch, Act&& act) const {
    for (int64_t piece = stretches[stretch]; piece < stretches[stretch + 1]; piece++)
      for (int64_t x = index.first[piece]; x < index.first[piece + 1]; x++) {
        const Band& b = p.bands[index.list[x]];
        int64_t first = std::max(b.q0, pieces[piece].begin), last = std::min(b.q1, pieces[piece].end);
        int64_t k_begin = std::max(b.k0, first + b.lo), k_end = std::min(b.k1, last + b.hi);
        if (k_begin >= k_end) continue;
        for (int64_t block = blocks.of(k_begin); block < blocks.count() && blocks[block].begin < k_end; block++)
          act(Job{(int32_t)block, (int32_t)piece, index.list[x]});
      }
  }

  // The queries of a job, and of its block the keys that they attend.
  Range queries_of(const Job& job) const {
    const Band& band = p.bands[job.band];
    Range piece = pieces[job.piece];
    return {std::max(band.q0, piece.begin), std::min(band.q1, piece.end)};
  }
  Range keys_of(const Job& job) const {
    const Band& band = p.bands[job.band];
    Range q = queries_of(job), keys = blocks[job.block];
    return {std::max({band.k0, q.begin + band.lo, keys.begin}), std::min({band.k1, q.end + band.hi, keys.end})};
  }

  // A stretch and the heads of one kv head.
  struct Stretch {
    const Kernel& kernel;
    Scratch& s;
    int64_t q0, q1, kv;
    Rows<T> next_q, next_k, next_v;  // what the next stretch begins with
    int64_t left = rows();           // rows that are not yet written

    int64_t rows() const { return (q1 - q0) * kernel.group(); }

    void run(int64_t stretch) {
      const auto& k = kernel;
      std::fill(s.top + 0, s.top + rows(), -INFINITY);
      std::fill(s.raw_top + 0, s.raw_top + rows(), -INFINITY);
      std::fill(s.total + 0, s.total + rows() * VL, 0.f);
      std::fill(s.states.begin(), s.states.end(), State::EMPTY);
      s.jobs.clear();
      k.each_job(stretch, [&](const Job& job) { s.jobs.push_back(job); });
      std::sort(s.jobs.begin(), s.jobs.end(), [](const Job& x, const Job& y) {
        return std::tie(x.block, x.piece, x.band) < std::tie(y.block, y.piece, y.band);
      });
      for (size_t first = 0, last; first < s.jobs.size(); first = last) {
        Range keys = k.blocks[s.jobs[first].block], packed{keys.end, keys.begin};
        for (last = first; last < s.jobs.size() && s.jobs[last].block == s.jobs[first].block; last++) {
          Range x = k.keys_of(s.jobs[last]);
          if (!x.empty()) packed = {std::min(packed.begin, x.begin), std::max(packed.end, x.end)};
        }
        if (packed.empty()) continue;
        packed.begin -= keys.begin, packed.end -= keys.begin;
        Across values = pack(keys.begin, packed);
        for (size_t i = first; i < last; i++) {
          Range q = k.queries_of(s.jobs[i]);
          bool is_last = is_last_of_piece(i);
          each_tile(k.p.bands[s.jobs[i].band], q.begin, q.end, k.group(), keys,
                    [&](const BandTile& x) { attend(x, {x.left(q.begin), x.right(q.end - 1)}, values, is_last); });
        }
      }
      finish();
      finish_streams();
    }

    bool is_last_of_piece(size_t job) const {
      auto same = [&](const Job& other) { return other.piece == s.jobs[job].piece; };
      return std::none_of(s.jobs.begin() + job + 1, s.jobs.end(), same);
    }

    // Of the block that begins at key kb, the keys `packed`; returns the values.
    Across pack(int64_t kb, const Range& packed) const {
      const auto& k = kernel;
      int begin = (int)packed.begin, end = (int)packed.end;
      pack_along<E>(word_rows<T>(k.p.k, kb, kv, begin, end, k.k_columns, s.k_rows), k.k_columns, begin, end, s.keys);
      return rows_across<T>(k.p.v, kb, kv, begin, end, k.v_columns, s.v_rows, s.values);
    }

    // `keys`: those that the job attends. `is_last`: nothing comes after it for these rows, so that their results are written while others are
    // computed.
    void attend(const BandTile& x, const Range& keys, const Across& values, bool is_last) {
      const auto& k = kernel;
      const Columns<E>&in = k.k_columns, &out = k.v_columns;
      Strips strips(x);
      if (!strips.count) return;
      int64_t head = kv * k.group(), to = (x.a - q0) * k.group() + x.skipped, after = std::min<int64_t>(TILE_ROWS, rows() - to - x.rows);
      Rows<T> rows(k.p.q, x.a, head, k.group(), x.skipped, x.rows), later(k.p.q, x.a, head, k.group(), x.skipped, x.rows + after);
      later.skip(x.rows);
      auto fetch_some = [&] {
        if (later.any()) fetch(later, 2, in.count);
        else fetch(next_q, 2, in.count);
        fetch(next_k, 1, in.count), fetch(next_v, 1, out.count);
      };
      copy_rows<T, E, false>(rows, in, s.q);
      each_panel(strips, [&](int c, int vectors, const Strip& strip) {
        multiply<E>(strip.rows, vectors, (int)in.words, {s.q + strip.row * in.stride, in.stride, 1},
                           {s.keys + c / NR * NR * in.stride + c % NR, NR}, Sums<false>{s.scores + strip.row * LEAD + c, LEAD});
        fetch_some();
      });
      soften(strips, to, is_last);
      bool add[TILE_ROWS / MR];
      for (int i = 0; i < strips.count; i++) add[i] = prepare(to + strips.at[i].row, strips.at[i].rows);
      T* result[TILE_ROWS];
      if (is_last) {
        int64_t at = row_at(x.a);
        for (int row = 0, g = x.skipped; row < x.rows; row++) {
          result[row] = (T*)(k.o.out_wide ? k.o.out_wide : k.o.out_narrow) + (at + g) * k.p.dv;
          k.o.lse[at + g] = s.lse[to + row];
          if (++g == x.group) g = 0, at += k.p.hq;
        }
      }
      for (int64_t c = 0; c < out.padded; c += NR)
        for (int i = 0; i < strips.count; i++) {
          const Strip& strip = strips.at[i];
          Range used = whole_words<E>({strip.begin, strip.end}, keys);
          float* sums = s.out + (to + strip.row) * out.padded + c;
          multiply_elements<E>(add[i], strip.rows, out.vectors(c), used.begin, used.end, {s.scores + strip.row * LEAD, LEAD, 1}, values.at(c),
                               sums, out.padded, Results<T>{is_last ? result + strip.row : nullptr, s.weights + to + strip.row, c, sums, (long)out.padded, k.streams});
          fetch_some();
        }
      if (is_last) {
        for (auto& strip : strips) {
          std::fill_n(s.states.data() + to + strip.row, strip.rows, State::WRITTEN);
          left -= strip.rows;
        }
      }
    }

    // Whether rows of out are to be added to; those that hold nothing yet then become 0.
    bool prepare(int64_t j, int rows) const {
      State* states = s.states.data() + j;
      bool any = std::count(states, states + rows, State::SUMS) > 0;
      for (int row = 0; row < rows; row++) {
        if (any && states[row] == State::EMPTY) clear(j + row);
        states[row] = State::SUMS;
      }
      return any;
    }

    void clear(int64_t j) const { std::fill_n(s.out + j * kernel.v_columns.padded, kernel.v_columns.padded, 0.f); }

    // Scores to probabilities, in place, as words, and to sums. Row 0 of the tile is row `to` of the stretch. VL rows at a time, all over the same
    // columns: their maxima are folded together, and are there before the first exponential.
    void soften(const Strips& strips, int64_t to, bool is_last) const {
      const Problem& p = kernel.p;
      bool capped = p.softcap > 0;
      float factor = capped ? LOG2E : p.scale * LOG2E;
      const Strip& final = strips.end()[-1];
      for (int row = strips.begin()->row, end = final.row + final.rows; row < end; row += VL) {
        int num = std::min(VL, end - row);
        const Span* spans = strips.rows + row;
        RowVectors vectors(spans, num);
        float* scores = s.scores + row * LEAD;
        vf highest[VL];
        for (int i = 0; i < VL; i++) highest[i] = splat(-INFINITY);
        for (int i = 0; i < num; i++) {
          if (capped && spans[i].begin < spans[i].end) cap(to + row + i, scores + i * LEAD, spans[i]);
          Inside attended(spans[i].begin, spans[i].end);
          vectors.each([&](int c, auto partial) {
            vf x = load(scores + i * LEAD + c) * factor;
            if (partial) x = attended(c) ? x : splat(-INFINITY);
            highest[i] = vmax(highest[i], x);
          });
        }
        raise_tops(to + row, num, fold_rows(highest, vmax));
        for (int i = 0; i < num; i++) {
          int64_t j = to + row + i;
          vf top = splat(s.top[j]), sums = load(s.total + j * VL);
          Inside attended(spans[i].begin, spans[i].end);
          vectors.each([&](int c, auto partial) {
            vf e = exp2v(rounded(load(scores + i * LEAD + c) * factor) - top);  // as for the maximum: the largest less itself must be 0
            if (partial) e = attended(c) ? e : vf{};
            sums += e;
            E::put(scores + i * LEAD, c, e);
          });
          store(s.total + j * VL, sums);
        }
        if (is_last) sum_up(to + row);
      }
    }

    // Where maxima rise, what was summed up before shrinks.
    void raise_tops(int64_t j, int num, vf highest) const {
      vf before = load(s.top + j);
      vi shrinks = (highest > before) & (before > -INFINITY);
      store(s.top + j, highest > before ? highest : before);
      if (!any(shrinks)) return;
      for (int i = 0; i < num; i++) {
        if (!shrinks[i]) continue;
        float shrink = std::exp2(before[i] - highest[i]), *total = s.total + (j + i) * VL, *out = s.out + (j + i) * kernel.v_columns.padded;
        store(total, load(total) * shrink);
        for (int64_t e = 0; e < kernel.v_columns.padded; e += VL) store(out + e, load(out + e) * shrink);
      }
    }

    void cap(int64_t j, float* row, Span span) const {
      const Problem& p = kernel.p;
      vf raw = splat(-INFINITY);
      for (int c = span.begin / VL * VL; c < span.end; c += VL) {
        vf x = load(row + c) * p.scale;
        raw = vmax(raw, inside(c, span.begin, span.end) ? x : splat(-INFINITY));
        store(row + c, tanhv(x * (1.f / p.softcap)) * p.softcap);
      }
      s.raw_top[j] = std::max(s.raw_top[j], largest(raw) * LOG2E);
    }

    // What is left of VL rows from row j on when all is summed up.
    void sum_up(int64_t j) const {
      vf sums = sums_of(s.total + j * VL);
      store(s.sums + j, sums);
      store(s.lse + j, sums != 0.f ? (load(s.top + j) + log2v(sums)) * LN2 : splat(-INFINITY));
      store(s.weights + j, sums != 0.f ? 1.f / sums : vf{});
    }

    // Results of a strip of a tile whose row 0 is row `to` of the stretch.
    void finish(const BandTile& x, const Strip& strip, int64_t to) {
      int64_t at = row_at(x.query(strip.row));
      int g = (x.skipped + strip.row) % x.group;
      for (int row = strip.row; row < strip.row + strip.rows; row++) {
        finish_row(to + row, at + g);
        if (++g == x.group) g = 0, at += kernel.p.hq;
      }
      std::fill_n(s.states.data() + to + strip.row, strip.rows, State::WRITTEN);
      left -= strip.rows;
    }

    // Results of the rows that are left.
    void finish() const {
      int64_t j = 0, done = 0;
      for (int64_t q = q0; left && q < q1; q++)
        for (int g = 0; g < kernel.group(); g++, j++) {
          if (s.states[j] == State::WRITTEN) continue;
          if (s.states[j] == State::EMPTY) clear(j);
          for (; done <= j; done += VL)
            if (done + VL > j) sum_up(done);
          finish_row(j, row_at(q) + g);
        }
    }

    // Row of the outputs of a query and the first head.
    int64_t row_at(int64_t q) const { return q * kernel.p.hq + kv * kernel.group(); }

    void finish_row(int64_t j, int64_t at) const {
      const Problem& p = kernel.p;
      const ForwardOutput& o = kernel.o;
      const float* src = s.out + j * kernel.v_columns.padded;
      float lse = s.lse[j], weight = s.weights[j];
      if (o.merge) {
        float *dst = o.out_wide + at * p.dv, before = o.lse[at];
        if (lse == -INFINITY) return;
        float merged = std::max(before, lse) + std::log1p(std::exp(-std::abs(before - lse)));
        float keep = std::exp(before - merged);
        weight *= std::exp(lse - merged);
        for (int64_t c = 0; c < p.dv; c++) dst[c] = dst[c] * keep + src[c] * weight;
        o.lse[at] = merged;
        return;
      }
      o.lse[at] = lse;
      if (o.out_wide) write_row(src, weight, p.dv, o.out_wide + at * p.dv, kernel.streams);
      else write_row(src, weight, p.dv, (T*)o.out_narrow + at * p.dv, kernel.streams);
    }

    // The largest logit of a head, times log2 e, before the softcap. A NaN among them is in its row's total.
    float top_of(int64_t g) const {
      float top = -INFINITY;
      bool capped = kernel.p.softcap > 0;
      for (int64_t j = g; j < rows(); j += kernel.group()) {
        float total = s.sums[j];
        top = larger(top, std::isnan(total) ? total : capped ? s.raw_top[j] : s.top[j]);
      }
      return top;
    }
  };
};

// Where stretches begin and end, in pieces. Results do not depend on how long they are: where there are few for the threads, they are shorter.
std::vector<int64_t> make_stretches(const Problem& p, const Pieces& pieces) {
  int64_t queries = std::max<int64_t>(PIECE_Q, ROWS_WANTED / (p.hq / p.hk));
  while (queries > PIECE_Q && ceil_div(p.num_q, queries) * p.hk < 8 * p.threads) queries = std::max(PIECE_Q, queries / 2);
  std::vector<int64_t> borders{0};
  for (int64_t piece = 0, begin = 0; piece < pieces.count(); piece++)
    if (pieces[piece].end > begin + queries) begin = pieces[piece].begin, borders.push_back(piece);
  borders.push_back(pieces.count());
  return borders;
}

template <class T>
void run(const Problem& p, const ForwardOutput& o) {
  Pieces pieces(p, true, PIECE_Q), blocks(p, false, BLOCK_K);
  PieceBands index(p, true, pieces);
  std::vector<int64_t> stretches = make_stretches(p, pieces);
  void* out = o.out_wide ? o.out_wide : o.out_narrow;
  int64_t row = p.dv * (int64_t)(o.out_wide ? sizeof(float) : sizeof(T)), size = p.num_q * p.hq * row;
  Kernel<T> kernel{p, o, pieces, blocks, index, stretches, to_stream(out, row, size)};
  int64_t num_stretches = (int64_t)stretches.size() - 1, count = num_stretches * p.hk, group = kernel.group();

  // Longest stretches first, the kv heads of one together.
  std::vector<int64_t> work(num_stretches, 0), order(num_stretches);
  std::vector<Range> first_keys(num_stretches, {0, 0});
  int64_t queries = 0;
  for (int64_t i = 0; i < num_stretches; i++) {
    order[i] = i;
    int64_t first_block = blocks.count();
    kernel.each_job(i, [&](const Job& job) {
      work[i]++;
      if (job.block > first_block) return;
      Range keys = kernel.keys_of(job);
      Range& to = first_keys[i];
      if (job.block < first_block) first_block = job.block, to = keys;
      else to = {std::min(to.begin, keys.begin), std::max(to.end, keys.end)};
    });
    queries = std::max(queries, pieces[stretches[i + 1] - 1].end - pieces[stretches[i]].begin);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return work[x] > work[y]; });

  if (!o.merge) prefer_large_pages(out, size);
  std::vector<float> tops(o.max_logits ? num_stretches * p.hq : 0, -INFINITY);
  std::vector<std::unique_ptr<Scratch>> scratch(std::min<int64_t>(p.threads, count));
  for (auto& s : scratch) s = std::make_unique<Scratch>(kernel.k_columns, kernel.v_columns, group * queries, work[order[0]]);
  parallel(count, p.threads, [&](int64_t task, int worker) {
    int64_t i = order[task / p.hk];
    int64_t next = order[std::min(count - 1, task + 1) / p.hk], next_kv = (task + 1) % p.hk, next_q = pieces[stretches[next]].begin;
    Range next_keys = first_keys[next];
    typename Kernel<T>::Stretch stretch{kernel, *scratch[worker], pieces[stretches[i]].begin, pieces[stretches[i + 1] - 1].end, task % p.hk,
                                        {p.q, next_q, next_kv * group, (int)group, 0, std::min<int64_t>(TILE_ROWS, (p.num_q - next_q) * group)},
                                        {p.k, next_keys.begin, next_kv, 1, 0, next_keys.end - next_keys.begin},
                                        {p.v, next_keys.begin, next_kv, 1, 0, next_keys.end - next_keys.begin}};
    stretch.run(i);
    if (o.max_logits)
      for (int64_t g = 0; g < group; g++) tops[i * p.hq + stretch.kv * group + g] = stretch.top_of(g) * LN2;
  });
  if (o.max_logits) {
    if (!o.merge) std::fill(o.max_logits, o.max_logits + p.hq, -INFINITY);
    for (int64_t i = 0; i < num_stretches * p.hq; i++) o.max_logits[i % p.hq] = larger(o.max_logits[i % p.hq], tops[i]);
  }
}

}  // namespace

void forward(const Problem& p, const ForwardOutput& o) {
  if (p.dtype == 0) run<float>(p, o);
  else if (p.dtype == 1) run<bf16>(p, o);

}
