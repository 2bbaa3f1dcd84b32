// Forward: online softmax over blocks of keys (Milakov and Gimelshein 2018; Dao et al. 2022). A task is a stretch of queries and the heads that
// share one head of keys: its queries and each block of values that it attends are packed once, keys are multiplied where they lie if they can be.
#include <algorithm>
#include <memory>

#include "attention.h"
#include "lanes.h"
#include "pack.h"

namespace {

constexpr int64_t ROWS_WANTED = 480;        // of a stretch: they pay for packing, and their outputs stay in the caches
constexpr int64_t ROWS_ENOUGH = 2 * LANES;  // of a stretch that ends where the next document begins
constexpr int64_t FETCHED = LANES;          // rows of the next stretch, while one is computed: its first tile
constexpr int64_t PIECE_Q = LANES;          // queries of a piece of a stretch: whole tiles, whatever the heads of a group

// One piece of a stretch against one block of keys, by one band.
struct Job { int32_t block, piece; int64_t band; };

// A tile of a stretch, which has LANES places for its rows from `place` on. Row 0 is the head `skipped` of query `a`.
struct Tile {
  int64_t a, place;
  int skipped, rows;
  bool packed;
};

// What a worker needs for a stretch. Tops are scores (see Softmax).
struct Scratch {
  Buffer k_rows, v_rows, values, q_rows, q, q_once, scores, top, total, lse, weights, raw_top;
  SumRows out;
  std::vector<Job> jobs;
  std::vector<Tile> tiles;
  std::vector<int> first_tile;  // of each piece
  template <class E>
  Scratch(const Columns<E>& k, const Columns<E>& v, int64_t places, int64_t max_jobs)
      : k_rows(BLOCK_K * k.stride), v_rows(BLOCK_K * v.stride), values(v.across(BLOCK_K)), q_rows(VL * k.stride), q(places * k.stride),
        q_once(LANES * k.stride), scores(BLOCK_K * LANES), top(places), total(places), lse(places), weights(places), raw_top(places),
        out(places, v.padded) {
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
  bool streams, leaves;  // results: past the caches, as they are made
  std::vector<int> lane_queries;  // of lanes of a tile that begins with a query's first head
  Columns<E> k_columns{p.d}, v_columns{p.dv};

  int group() const { return (int)(p.hq / p.hk); }
  Softmax<E> softmax() const { return {p.scale, p.softcap}; }

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
    int64_t first_piece, last_piece, kv;
    Rows<T> q_ahead, next_q, next_k, next_v;  // of this stretch, and what the next one begins with
    int64_t places = 0, left = 0;  // left: rows that are not yet written

    void run(int64_t stretch) {
      const auto& k = kernel;
      make_tiles();
      std::fill(s.top + 0, s.top + places, -INFINITY);
      std::fill(s.raw_top + 0, s.raw_top + places, -INFINITY);
      std::fill(s.total + 0, s.total + places, 0.f);
      s.out.reset(places);
      s.jobs.clear();
      k.each_job(stretch, [&](const Job& job) { s.jobs.push_back(job); });
      std::sort(s.jobs.begin(), s.jobs.end(), [](const Job& x, const Job& y) {
        return std::tie(x.block, x.piece, x.band) < std::tie(y.block, y.piece, y.band);
      });
      for (size_t first = 0, last; first < s.jobs.size(); first = last) {
        Range keys = k.blocks[s.jobs[first].block], packed{keys.end, keys.begin};
        for (last = first; last < s.jobs.size() && s.jobs[last].block == s.jobs[first].block; last++) {
          Range x = k.keys_of(s.jobs[last]);
          if (!x.empty()) packed = join(packed, x);
        }
        if (packed.empty()) continue;
        int begin = (int)(packed.begin - keys.begin), end = (int)(packed.end - keys.begin);
        Left key_rows = left_rows<T>(k.p.k, keys.begin, kv, begin, end, k.k_columns, s.k_rows);
        WordRows value_rows = word_rows<T>(k.p.v, keys.begin, kv, begin, end, k.v_columns, s.v_rows);
        Scan<E> seen;
        Across values = rows_across<E>(value_rows, k.v_columns, begin, end, s.v_rows, s.values, seen);
        bool finite = seen.all_finite();
        for (size_t i = first; i < last; i++) {
          const Job& job = s.jobs[i];
          bool is_last = is_last_of_piece(i);
          int64_t piece = job.piece - first_piece;
          for (int t = s.first_tile[piece]; t < s.first_tile[piece + 1]; t++) attend(s.tiles[t], job, keys, key_rows, values, finite, is_last);
        }
      }
      finish();
    }

    void make_tiles() {
      const auto& k = kernel;
      int group = k.group();
      s.tiles.clear(), s.first_tile.clear();
      for (int64_t piece = first_piece; piece < last_piece; piece++) {
        s.first_tile.push_back((int)s.tiles.size());
        Range q = k.pieces[piece];
        int64_t rows = (q.end - q.begin) * group;
        for (int64_t row = 0; row < rows; row += LANES, places += LANES)
          s.tiles.push_back({q.begin + row / group, places, (int)(row % group), (int)std::min<int64_t>(LANES, rows - row), false});
        left += rows;
      }
      s.first_tile.push_back((int)s.tiles.size());
    }

    bool is_last_of_piece(size_t job) const {
      auto same = [&](const Job& other) { return other.piece == s.jobs[job].piece; };
      return std::none_of(s.jobs.begin() + job + 1, s.jobs.end(), same);
    }

    // Rows that will be needed, brought nearer between products.
    void fetch_some() {
      fetch(q_ahead.any() ? q_ahead : next_q, 3, kernel.p.d);
      fetch(next_k, 1, kernel.p.d), fetch(next_v, 1, kernel.p.dv);
    }

    // `is_last`: nothing comes after it for these rows, so that results leave with the last product.
    void attend(Tile& tile, const Job& job, const Range& keys, const Left& key_rows, const Across& values, bool finite, bool is_last) {
      const auto& k = kernel;
      LaneSpans x(k.p.bands[job.band], k.queries_of(job), keys, {tile.a, tile.skipped, tile.rows, k.group(), k.lane_queries.data() + tile.skipped});
      if (!x.any()) return;
      bool once = is_last && !tile.packed, leaves = is_last && k.leaves;  // once: no other job looks at the tile
      float* q = once ? s.q_once : s.q + tile.place * k.k_columns.stride;
      if (!tile.packed) pack(tile, q);
      multiply_keys(x, key_rows, q);
      Softmax<E> softmax = k.softmax();
      for (int v = x.lanes.begin / VL; v * VL < x.lanes.end; v++) {
        int64_t at = tile.place + v * VL;
        vf top = raise_tops(at, softmax.top(x, v, s.scores, s.raw_top + at));
        store(s.total + at, load(s.total + at) + softmax.soften(x, v, s.scores, top));
        if (leaves) sum_up(at);
      }
      Range allowed = k.keys_of(job);
      multiply_values(x, tile, {allowed.begin - keys.begin, allowed.end - keys.begin}, values, finite, leaves, once && leaves);
    }

    // Scores of the keys that a tile attends. This and what follows are inlined so that what is fetched stays in registers: a call costs 2%.
    __attribute__((always_inline)) void multiply_keys(const LaneSpans& x, const Left& key_rows, const float* q) {
      const Columns<E>& columns = kernel.k_columns;
      for (int c = x.first; c < x.last; c += MR) {
        int rows = std::min(MR, x.last - c), begin = 0, end = VECTORS;
        auto attends = [&](int v) { return x.vectors[v].begin < c + rows && x.vectors[v].end > c; };
        while (begin < end && !attends(begin)) begin++;
        while (begin < end && !attends(end - 1)) end--;
        for (int v = begin; v < end; v += PANEL - v % PANEL) {
          int vectors = std::min(end, v / PANEL * PANEL + PANEL) - v;
          multiply<E>(rows, vectors, (int)columns.words, Left{key_rows.data + c * key_rows.row, key_rows.row, 1},
                      {q + v / PANEL * PANEL * VL * columns.stride + v % PANEL * VL, PANEL * VL}, Scores{s.scores + c * LANES + v * VL, LANES});
          fetch_some();
        }
      }
    }

    // Probabilities times values, to the sums of a tile, or as results. Keys that share a word with those that a strip attends may be multiplied by
    // its zeros where they are `allowed`; but 0 times a value that is not `finite` would be NaN, so then a row is multiplied by its own keys alone.
    // `fresh`: there are no sums yet, and will be none.
    __attribute__((always_inline)) void multiply_values(const LaneSpans& x, const Tile& tile, const Range& allowed, const Across& values,
                                                        bool finite, bool leaves, bool fresh) {
      const Columns<E>& columns = kernel.v_columns;
      struct Part {
        int row, rows;
        Range used;
        bool add;
      } parts[LANES], *end = parts;
      int most = finite ? MR : 1;
      for (int row = x.lanes.begin; row < x.lanes.end; row += most) {
        int rows = std::min(most, x.lanes.end - row);
        Span strip = x.strip(row, rows);
        Range attended{strip.begin, strip.end};
        *end++ = {row, rows, finite ? whole_words<E>(attended, allowed) : attended, !fresh && s.out.prepare(tile.place + row, rows)};
      }
      T* results[LANES];
      if (leaves) place_results(tile, x.lanes, results);
      for (int64_t c = 0; c < columns.padded; c += NR)
        for (const Part* part = parts; part < end; part++) {
          int64_t place = tile.place + part->row;
          Sums sums{s.out.row(place) + c, (long)columns.padded, part->add};
          Results<T> to{sums, s.weights + place, results + part->row, c, kernel.streams};
          multiply_elements<E>(part->rows, columns.vectors(c), part->used, Left{s.scores + part->row, 1, LANES}, values.at(c), sums,
                               leaves ? &to : nullptr);
          fetch_some();
        }
      if (!leaves) return;
      int64_t rows = x.lanes.end - x.lanes.begin;
      s.out.set_written(tile.place + x.lanes.begin, rows), left -= rows;
    }

    // act(row, its row of the outputs) for some rows of a tile.
    template <class Act>
    void each_row(const Tile& tile, const Span& rows, Act&& act) const {
      unsigned group = kernel.group(), first = tile.skipped + rows.begin, g = first % group;
      int64_t at = (tile.a + first / group) * kernel.p.hq + kv * group;  // of the query's first head
      for (int row = rows.begin; row < rows.end; row++) {
        act(row, at + g);
        if (++g == group) g = 0, at += kernel.p.hq;
      }
    }

    // Where the results of some rows of a tile go. Their lse goes there.
    void place_results(const Tile& tile, const Span& lanes, T** results) const {
      const ForwardOutput& o = kernel.o;
      T* out = (T*)(o.out_wide ? o.out_wide : o.out_narrow);
      each_row(tile, lanes, [&](int row, int64_t at) {
        results[row] = out + at * kernel.p.dv;
        o.lse[at] = s.lse[tile.place + row];
      });
    }

    // The queries of a tile, at its first use.
    void pack(Tile& tile, float* to) {
      const auto& k = kernel;
      Rows<T> rows(k.p.q, tile.a, kv * k.group(), k.group(), tile.skipped, tile.rows);
      pack_tile<T, E, PANEL * VL>(rows, tile.rows, k.k_columns, s.q_rows, to);
      tile.packed = true;
    }

    // Where maxima rise, what was summed up before shrinks. Returns the maxima.
    vf raise_tops(int64_t j, vf highest) const {
      vf before = load(s.top + j);
      vi shrinks = (highest > before) & (before > -INFINITY);
      vf top = highest > before ? highest : before;
      store(s.top + j, top);
      if (!any(shrinks)) return top;
      vf shrink = shrinks ? kernel.softmax().shrink(before, highest) : splat(1.f);
      store(s.total + j, load(s.total + j) * shrink);
      for (int i = 0; i < VL; i++) {
        if (!shrinks[i] || s.out.state(j + i) == SumRows::EMPTY) continue;
        float* out = s.out.row(j + i);
        for (int64_t e = 0; e < kernel.v_columns.padded; e += VL) store(out + e, load(out + e) * shrink[i]);
      }
      return top;
    }

    // What is left of VL rows when all is summed up.
    void sum_up(int64_t j) const {
      vf sums = load(s.total + j);
      store(s.lse + j, sums != 0.f ? kernel.softmax().logit(load(s.top + j)) + log2v(sums) * LN2 : splat(-INFINITY));
      store(s.weights + j, sums != 0.f ? 1.f / sums : vf{});
    }

    // Results of the rows that are left.
    void finish() const {
      if (!left) return;
      for (int64_t j = 0; j < places; j += VL) sum_up(j);
      for (const Tile& tile : s.tiles)
        each_row(tile, {0, tile.rows}, [&](int row, int64_t at) {
          if (s.out.complete(tile.place + row)) finish_row(tile.place + row, at);
        });
    }

    void finish_row(int64_t j, int64_t at) const {
      const Problem& p = kernel.p;
      const ForwardOutput& o = kernel.o;
      const float* src = s.out.row(j);
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

    // The largest logit of a head before the softcap. A NaN among them is in its row's total.
    float top_of(int64_t head) const {
      float top = -INFINITY;
      bool capped = kernel.p.softcap > 0;
      float factor = std::abs(kernel.softmax().factor());
      int group = kernel.group();
      for (const Tile& tile : s.tiles)
        for (int64_t row = (head - tile.skipped + group) % group; row < tile.rows; row += group) {
          int64_t j = tile.place + row;
          top = larger(top, std::isnan(s.total[j]) ? s.total[j] : capped ? s.raw_top[j] : s.top[j] > -INFINITY ? s.top[j] * factor : s.top[j]);
        }
      return top;
    }
  };
};

// Where stretches begin and end, in pieces. Results do not depend on how long they are: where there are few for the threads, they are shorter.
std::vector<int64_t> make_stretches(const Problem& p, const Pieces& pieces) {
  int64_t queries = std::max<int64_t>(PIECE_Q, ROWS_WANTED / (p.hq / p.hk)), enough = ceil_div(ROWS_ENOUGH, p.hq / p.hk);
  while (queries > PIECE_Q && ceil_div(p.num_q, queries) * p.hk < 8 * p.threads) queries = std::max(PIECE_Q, queries / 2);
  std::vector<int64_t> borders{0}, documents = find_documents(p, true);
  Ascending begins(documents);
  for (int64_t piece = 1, begin = 0; piece < pieces.count(); piece++) {
    Range x = pieces[piece];
    bool begins_document = begins.from(x.begin) == x.begin;
    if (x.end > begin + queries || (begins_document && x.begin >= begin + enough)) begin = x.begin, borders.push_back(piece);
  }
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
  bool leaves = !o.merge && may_leave<typename ProductOf<T>::type, T>(p.dv, o.out_wide);
  Kernel<T> kernel{p, o, pieces, blocks, index, stretches, to_stream(out, row, size), leaves, {}};
  for (int64_t lane = 0; lane < LANES + kernel.group(); lane++) kernel.lane_queries.push_back((int)(lane / kernel.group()));
  int64_t num_stretches = (int64_t)stretches.size() - 1, count = num_stretches * p.hk, group = kernel.group();

  // Longest stretches first, the kv heads of one together.
  std::vector<int64_t> work(num_stretches, 0), order(num_stretches);
  std::vector<Range> first_keys(num_stretches, {0, 0});
  int64_t places = 0;
  for (int64_t i = 0; i < num_stretches; i++) {
    order[i] = i;
    int64_t first_block = blocks.count();
    kernel.each_job(i, [&](const Job& job) {
      work[i]++;
      if (job.block > first_block) return;
      Range keys = kernel.keys_of(job);
      Range& to = first_keys[i];
      if (job.block < first_block) first_block = job.block, to = keys;
      else to = join(to, keys);
    });
    int64_t own = 0;
    for (int64_t piece = stretches[i]; piece < stretches[i + 1]; piece++)
      own += ceil_div((pieces[piece].end - pieces[piece].begin) * group, LANES) * LANES;
    places = std::max(places, own);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return work[x] > work[y]; });

  if (!o.merge) prefer_large_pages(out, size);
  std::vector<float> tops(o.max_logits ? num_stretches * p.hq : 0, -INFINITY);
  std::vector<std::unique_ptr<Scratch>> scratch(std::min<int64_t>(p.threads, count));
  for (auto& s : scratch) s = std::make_unique<Scratch>(kernel.k_columns, kernel.v_columns, places, work[order[0]]);
  parallel(count, p.threads, [&](int64_t task, int worker) {
    int64_t i = order[task / p.hk];
    int64_t next = order[std::min(count - 1, task + 1) / p.hk], next_kv = (task + 1) % p.hk, next_q = pieces[stretches[next]].begin;
    Range next_keys = first_keys[next];
    int64_t begin = pieces[stretches[i]].begin, end = pieces[stretches[i + 1] - 1].end, kv = task % p.hk;
    typename Kernel<T>::Stretch stretch{kernel, *scratch[worker], stretches[i], stretches[i + 1], kv,
                                        {p.q, begin, kv * group, (int)group, 0, (end - begin) * group},
                                        {p.q, next_q, next_kv * group, (int)group, 0, std::min<int64_t>(FETCHED, (p.num_q - next_q) * group)},
                                        {p.k, next_keys.begin, next_kv, 1, 0, next_keys.end - next_keys.begin},
                                        {p.v, next_keys.begin, next_kv, 1, 0, next_keys.end - next_keys.begin}};
    stretch.q_ahead.skip(FETCHED);
    stretch.run(i);
    if (o.max_logits)
      for (int64_t g = 0; g < group; g++) tops[i * p.hq + stretch.kv * group + g] = stretch.top_of(g);
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
  else run<fp16>(p, o);
}
