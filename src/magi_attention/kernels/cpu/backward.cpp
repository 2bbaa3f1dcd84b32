// Backward: five products for each tile of queries and block of keys (Dao et al. 2022, algorithm 4). A task is a partition of the keys and one or
// all of their heads. What is added to a query's dq, and in which order, is fixed by the problem, not by the threads.
#include <algorithm>
#include <memory>

#include "attention.h"
#include "bands.h"
#include "pack.h"
#include "partition.h"
#include "score_gradients.h"

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
  Buffer k_rows, v_rows, k_along, v_along, k_across, q_rows, dout_rows, q_across, dout_across, scores, dscores, dq, zeros;
  SumRows dk, dv;
  std::vector<BandTile> tiles;
  int times[BLOCK_K + 1];  // that a tile attends a key of the block
  bool any_once;           // whether that is 1 of any
  Scratch(int64_t d, int64_t d_out)
      : in(d), out(d_out), k_rows(BLOCK_K * in.stride), v_rows(BLOCK_K * out.stride), k_along(BLOCK_K * in.stride),
        v_along(BLOCK_K * out.stride), k_across(in.across(BLOCK_K)), q_rows(MOST_ROWS * in.stride), dout_rows(MOST_ROWS * out.stride),
        q_across(in.across(MOST_ROWS)), dout_across(out.across(MOST_ROWS)), scores(MOST_ROWS * LEAD), dscores(MOST_ROWS * LEAD),
        dq(MOST_ROWS * in.padded), zeros(std::max(in.stride, out.stride)), dk(BLOCK_K, in.padded), dv(BLOCK_K, out.padded) {
    std::fill_n(zeros + 0, std::max(in.stride, out.stride), 0.f);
  }
  const float* probs_across() const { return scores; }
  const float* dscores_across() const { return E::n == 1 ? dscores : scores + LEAD; }
};

constexpr int64_t KEYS_ENOUGH = 32;  // of a block that ends where the next document begins
// Rows and keys of the next block that are fetched while the last tile of one is worked on; rows at a time.
constexpr int64_t FETCHED_ROWS = MOST_ROWS, FETCHED_KEYS = 64;
constexpr int AT_ONCE = 2;

// A block of keys and one of their heads.
struct Unit { int64_t block, kv; };

template <class T, class D, class E>
struct Kernel {
  const Problem& p;
  const BackwardInput& in;
  const Pieces& blocks;  // of keys
  const PieceBands& index;
  const Partitions& parts;
  Scratch<E>& s;
  bool stream_q, stream_k, stream_v;  // dq, dk, dv

  int group() const { return (int)(p.hq / p.hk); }

  Row row_of_tile(const BandTile& x, const Strips& strips, int row, int64_t kv) const {
    if (row >= x.rows) return {0.f, vf{}, 0, 0};
    int64_t q = x.query(row), at = x.a * p.hq + kv * group() + x.skipped + row + (q - x.a) * (p.hq - group());
    bool any = in.lse[at] != -INFINITY;
    return {in.lse[at], splat(in.delta[at] * p.scale), any ? strips.rows[row].begin : 0, any ? strips.rows[row].end : 0};
  }

  // Of the rows of a tile: 0, or NaN where one is not finite. Such a row makes none of its products finite, so a vector of each tells.
  struct Finite { vf q{}, dout{}; };

  // E::n rows of a tile from one on; columns [begin, end), whole vectors.
  void differentiate_rows(const BandTile& x, const Strips& strips, int first, int64_t kv, int begin, int end, Finite& finite) const {
    float *score = s.scores + first * LEAD, *dscore = s.dscores + first * LEAD;
    Row row[E::n];
    for (int i = 0; i < E::n; i++) row[i] = row_of_tile(x, strips, first + i, kv);
    for (int i = 0; i < std::min(E::n, x.rows - first); i++) {
      int c = i * LEAD + strips.rows[first + i].begin / VL * VL;
      finite.q += load(score + c) * 0.f, finite.dout += load(dscore + c) * 0.f;
    }
    int full_begin = row[0].r0, full_end = row[0].r1;
    for (int i = 1; i < E::n; i++) full_begin = std::max(full_begin, row[i].r0), full_end = std::min(full_end, row[i].r1);
    auto act = [&](int c, auto partial, auto ordinary) {
      Gradient of[E::n];
      for (int i = 0; i < E::n; i++) of[i] = differentiate<partial, ordinary>(p, row[i], c, load(score + i * LEAD + c), load(dscore + i * LEAD + c));
      for (int i = 0; i < E::n; i++) E::put(dscore + i * LEAD, c, of[i].dscore);
      if constexpr (E::n == 1) {
        store(score + c, of[0].prob);
      } else {
        store(score + c, E::word({of[0].prob, of[1].prob}));
        store(score + LEAD + c, E::word({of[0].dscore, of[1].dscore}));
      }
    };
    full_begin = std::min(end, (full_begin + VL - 1) / VL * VL), full_end = full_end / VL * VL;
    auto act_on_all = [&](auto ordinary) {
      int c = begin;
      for (; c < full_begin; c += VL) act(c, std::true_type{}, ordinary);
      for (; c < full_end; c += VL) act(c, std::false_type{}, ordinary);
      for (; c < end; c += VL) act(c, std::true_type{}, ordinary);
    };
    bool all_ordinary = true;
    for (int i = 0; i < E::n; i++) all_ordinary &= row[i].is_ordinary();
    all_ordinary ? act_on_all(std::true_type{}) : act_on_all(std::false_type{});
    // Strips of keys look at a row up to MR - 1 columns (in pairs, one more) away from what it attends: there it is 0.
    constexpr int around = (MR + VL) / VL * VL;
    for (int i = 0; i < E::n; i++)
      for (float* to : {score + i * LEAD, dscore + i * LEAD}) {
        if (E::n == 2 && to == dscore + i * LEAD) continue;
        for (int c = std::max(0, begin - around); c < begin; c += VL) store(to + c, vf{});
        for (int c = end; c < std::min(BLOCK_K, end + around); c += VL) store(to + c, vf{});
      }
  }

  // Rows that will be needed, brought nearer between products.
  struct Ahead {
    const Problem& p;
    Rows<T> q;
    Rows<D> dout;
    Rows<T> k, v;
    void fetch_some() {
      if (k.any() || v.any()) fetch(k, AT_ONCE, p.d), fetch(v, AT_ONCE, p.dv);
      else fetch(q, AT_ONCE, p.d), fetch(dout, AT_ONCE, p.dv);
    }
  };

  // A tile of rows against the packed keys [packed) of its block.
  void tile(const BandTile& x, int64_t kv, int64_t part, const Across& k, bool finite_k, const Range& packed, Ahead ahead) const {
    Strips strips(x);
    auto fetch_some = [&] { ahead.fetch_some(); };
    each_row(x, [&](int64_t query, int g) {
      if (!parts.written_once(query)) prefetch<true>(parts.dq_row(part, query, kv * x.group + g), p.d * (int64_t)sizeof(float));
    });
    TileRows q = tile_rows<T>(p.q, x, kv, s.in, s.q_rows), dout = tile_rows<D>(in.dout, x, kv, s.out, s.dout_rows);
    Across q_across = q.across(s.q_across), dout_across = dout.across(s.dout_across);
    auto along = [&](const TileRows& rows, const float* panels, float* to) {
      each_panel(strips, [&](int c, int vectors, const Strip& strip) {
        multiply<E>(strip.rows, vectors, (int)rows.columns.words, rows.left(strip.row),
                    {panels + c / NR * NR * rows.columns.stride + c % NR, NR}, Scores{to + strip.row * LEAD + c, LEAD});
        fetch_some();
      });
    };
    along(q, s.k_along, s.scores);
    along(dout, s.v_along, s.dscores);
    Finite finite;
    for (const Strip& strip : strips)
      for (int r = strip.row; r < strip.row + strip.rows; r += E::n) differentiate_rows(x, strips, r, kv, strip.first(), strip.last(), finite);
    Range keys{std::max(packed.begin, x.band.k0 - x.keys.begin), std::min(packed.end, x.band.k1 - x.keys.begin)};
    to_queries(x, strips, kv, part, k, keys, finite_k, fetch_some);
    to_keys(s.probs_across(), dout_across, s.out, s.dv, x, value_output(kv), !any(finite.dout != 0.f), fetch_some);
    to_keys(s.dscores_across(), q_across, s.in, s.dk, x, key_output(kv), !any(finite.q != 0.f), fetch_some);
  }

  // The rows of a tile, and one of zeros, which completes the last word.
  struct TileRows {
    const Columns<E>& columns;
    int count;
    const float* at[MOST_ROWS + 1];

    // As the left side of a product, from one of them on.
    auto left(int row) const {
      if constexpr (E::n == 1) return Left{at[row], (long)columns.stride, 1};
      else return LeftRows{at + row};
    }
    Across across(float* to) const {
      [[maybe_unused]] NoScan none;
      if constexpr (E::n == 1) return {at[0], columns.stride, NR};
      else return pack_across<E>([&](int64_t i) { return (const char*)at[i]; }, columns, MOST_ROWS, 0, count + count % 2, to, none);
    }
  };

  // Where they lie if they can be used so, else copies. Single floats are copied: products read them again and again.
  template <class X>
  TileRows tile_rows(const View& from, const BandTile& x, int64_t kv, const Columns<E>& columns, float* copy) const {
    TileRows to{columns, x.rows, {}};
    Rows<X> rows(from, x.a, kv * x.group, x.group, x.skipped, x.rows);
    if (E::n > 1 && lie_as_words<X>(from, columns) && are_vectors<X>(columns)) {
      for (int i = 0; i < x.rows; i++) to.at[i] = (const float*)rows.next();
    } else {
      copy_rows<X, E>(rows, columns, copy);
      for (int i = 0; i < x.rows; i++) to.at[i] = copy + i * columns.stride;
    }
    to.at[x.rows] = s.zeros;
    return to;
  }

  // dq += dS K. Keys that share a word with those that a strip attends may be multiplied by its zeros where they are of `keys`; but 0 times a key
  // that is not `finite` would be NaN, so then a row is multiplied by its own keys alone.
  template <class Between>
  void to_queries(const BandTile& x, const Strips& strips, int64_t kv, int64_t part, const Across& k, const Range& keys, bool finite,
                  Between&& between) const {
    T* results[MOST_ROWS];
    bool all_leave = leaves(p.d);
    int row = 0;
    each_row(x, [&](int64_t q, int g) {
      results[row++] = (T*)in.dq + (q * p.hq + kv * x.group + g) * p.d;
      all_leave &= parts.written_once(q);
    });
    auto product = [&](int64_t c, int first, int rows, const Range& used) {
      Left left{s.dscores + first * LEAD, LEAD, 1};
      Sums sums{s.dq + first * s.in.padded + c, (long)s.in.padded, false};
      Results<T> to{sums, nullptr, results + first, c, stream_q};
      multiply_elements<E>(rows, s.in.vectors(c), used, left, k.at(c), sums, all_leave ? &to : nullptr);
      between();
    };
    for (int64_t c = 0; c < s.in.padded; c += NR)
      for (const Strip& strip : strips) {
        if (finite) product(c, strip.row, strip.rows, whole_words<E>({strip.begin, strip.end}, keys));
        else for (int r = strip.row; r < strip.row + strip.rows; r++) product(c, r, 1, {strips.rows[r].begin, strips.rows[r].end});
      }
    if (all_leave) return;
    const float* from = s.dq;
    each_row(x, [&](int64_t q, int g) {
      int64_t head = kv * x.group + g;
      if (parts.written_once(q)) {
        write(from, p.d, in.dq, q * p.hq + head, stream_q);
      } else {
        float* to = parts.dq_row(part, q, head);
        for (int64_t e = 0; e < p.d; e++) to[e] += from[e];
      }
      from += s.in.padded;
    });
  }

  // act(query, head of the group) for the rows of a tile.
  template <class Act>
  static void each_row(const BandTile& x, Act&& act) {
    int64_t q = x.a;
    for (int row = 0, g = x.skipped; row < x.rows; row++) {
      act(q, g);
      if (++g == x.group) g = 0, q++;
    }
  }

  // Where gradients of keys or values are wanted.
  struct Output {
    void* data;
    int64_t columns, kv;
    bool stream;
  };

  Output key_output(int64_t kv) const { return {in.dk, p.d, kv, stream_k}; }
  Output value_output(int64_t kv) const { return {in.dv, p.dv, kv, stream_v}; }

  // Whether results may leave products as they are made.
  bool leaves(int64_t columns) const { return may_leave<E, T>(columns, !in.narrow); }

  // sums [keys, columns] += weights^T [keys, rows] rows [rows, columns]. Where the rows are not `finite`, a key is multiplied by its own queries
  // alone: 0 times others would be NaN.
  template <class Between>
  void to_keys(const float* weights, const Across& rows, const Columns<E>& columns, SumRows& sums, const BandTile& x, const Output& output,
               bool finite, Between&& between) const {
    const Band& band = x.band;
    int key_begin = (int)x.attended().begin, key_end = (int)x.attended().end, most = finite ? MR : 1;
    // The rows whose queries attend one of the keys from c on, before c + num.
    auto rows_of = [&](int c, int num) {
      int64_t key = x.keys.begin + c - x.a;  // queries are counted from the tile's first
      int64_t first = std::max<int64_t>(0, key - band.hi), last = std::min<int64_t>(x.rows + 1, key + num - band.lo);
      Range rows{std::max<int64_t>(0, first * x.group - x.skipped), std::min<int64_t>(x.rows, last * x.group - x.skipped)};
      return finite ? whole_words<E>(rows, {0, x.rows + x.rows % E::n}) : rows;
    };
    struct Part {
      Range used;
      bool leaves, add;
    } parts[BLOCK_K];
    bool may_leave = s.any_once && leaves(output.columns);
    for (int c = key_begin, i = 0; c < key_end; c += most, i++) {
      int num = std::min(most, key_end - c);
      Part& part = parts[i] = {rows_of(c, num), false, false};
      if (part.used.empty()) continue;
      part.leaves = may_leave && std::all_of(s.times + c, s.times + c + num, [](int times) { return times == 1; });
      if (part.leaves) sums.set_written(c, num);
      else part.add = sums.prepare(c, num);
    }
    for (int64_t e = 0; e < columns.padded; e += NR)
      for (int c = key_begin, i = 0; c < key_end; c += most, i++) {
        int num = std::min(most, key_end - c);
        const Part& part = parts[i];
        if (part.used.empty()) continue;
        Left left{weights + c, 1, E::n * LEAD};
        Sums to{sums.row(c) + e, (long)columns.padded, part.add};
        T* results[MR];
        for (int key = 0; part.leaves && key < num; key++)
          results[key] = (T*)output.data + ((x.keys.begin + c + key) * p.hk + output.kv) * output.columns;
        Results<T> direct{to, nullptr, results, e, output.stream};
        multiply_elements<E>(num, columns.vectors(e), part.used, left, rows.at(e), to, part.leaves ? &direct : nullptr);
        between();
      }
  }

  // How many tiles attend each key of a block.
  void count_tiles(int64_t keys) const {
    std::fill_n(s.times, keys + 1, 0);
    for (const BandTile& x : s.tiles) s.times[x.attended().begin]++, s.times[x.attended().end]--;
    for (int64_t c = 1; c <= keys; c++) s.times[c] += s.times[c - 1];
    s.any_once = std::count(s.times, s.times + keys, 1) > 0;
  }

  // All queries against one block of keys. `next`: what comes after it, or null.
  void run(const Unit& unit, const Unit* next) const {
    int64_t kv = unit.kv, part = parts.of_block(unit.block);
    Range keys = blocks[unit.block], packed{keys.end - keys.begin, 0};
    s.tiles.clear();
    each_band(unit.block, [&](const Band& band, const Range& q) {
      each_tile(band, q.begin, q.end, group(), keys, [&](const BandTile& x) { s.tiles.push_back(x); });
    });
    for (const BandTile& x : s.tiles) packed = join(packed, x.attended());
    int64_t count = keys.end - keys.begin;
    count_tiles(count);
    s.dk.reset(count), s.dv.reset(count);
    Across k{};
    Scan<E> seen;
    if (!packed.empty()) {
      int first = (int)packed.begin, last = (int)packed.end;
      WordRows k_rows = word_rows<T>(p.k, keys.begin, kv, first, last, s.in, s.k_rows);
      pack_along<E, NR>(k_rows, s.in, first, last, s.k_along);
      k = rows_across<E>(k_rows, s.in, first, last, s.k_rows, s.k_across, seen);
      pack_along<E, NR>(word_rows<T>(p.v, keys.begin, kv, first, last, s.out, s.v_rows), s.out, first, last, s.v_along);
    }
    bool finite = seen.all_finite();
    for (size_t i = 0; i < s.tiles.size(); i++) tile(s.tiles[i], kv, part, k, finite, packed, after(i, kv, next));
    finish(s.dk, keys, key_output(kv)), finish(s.dv, keys, value_output(kv));
  }

  // What is read after a tile of a unit.
  Ahead after(size_t tile, int64_t kv, const Unit* next) const {
    if (tile + 1 < s.tiles.size()) {
      const BandTile& x = s.tiles[tile + 1];
      return ahead(kv, x.a, x.skipped, x.rows, {0, 0});
    }
    if (!next) return ahead(kv, 0, 0, 0, {0, 0});
    Range q = first_queries(next->block), keys = blocks[next->block];
    keys.end = std::min(keys.end, keys.begin + FETCHED_KEYS);
    return ahead(next->kv, q.begin, 0, std::min((q.end - q.begin) * group(), FETCHED_ROWS), keys);
  }
  Ahead ahead(int64_t kv, int64_t query, int skipped, int64_t rows, const Range& keys) const {
    int64_t head = kv * group(), count = keys.end - keys.begin;
    return {p, {p.q, query, head, group(), skipped, rows}, {in.dout, query, head, group(), skipped, rows},
            {p.k, keys.begin, kv, 1, 0, count}, {p.v, keys.begin, kv, 1, 0, count}};
  }

  // Of the first band that attends something of a block.
  Range first_queries(int64_t block) const {
    Range first{0, 0};
    each_band(block, [&](const Band&, const Range& q) { first = first.empty() ? q : first; });
    return first;
  }

  // Results of a block's keys that have not left.
  void finish(SumRows& sums, const Range& keys, const Output& output) const {
    for (int64_t c = 0; c < keys.end - keys.begin; c++)
      if (sums.complete(c)) write(sums.row(c), output.columns, output.data, (keys.begin + c) * p.hk + output.kv, output.stream);
  }

  void write(const float* from, int64_t columns, void* to, int64_t row, bool stream) const {
    if (in.narrow) write_row(from, 1.f, columns, (T*)to + row * columns, stream);
    else write_row(from, 1.f, columns, (float*)to + row * columns, stream);
  }

  // act(band, its queries that attend some of the block), where there are any.
  template <class Act>
  void each_band(int64_t number, Act&& act) const {
    for (int64_t at = index.first[number]; at < index.first[number + 1]; at++) {
      const Band& band = p.bands[index.list[at]];
      Range q = queries_of(band, blocks[number]);
      if (!q.empty()) act(band, q);
    }
  }
};

template <class T, class D>
void run(const Problem& p, const BackwardInput& in) {
  typedef typename std::conditional<std::is_same<T, D>::value, typename ProductOf<T>::type, Single>::type E;
  Pieces blocks(p, false, BLOCK_K, find_documents(p, false), KEYS_ENOUGH);
  PieceBands index(p, false, blocks);
  Partitions parts(p, in, blocks, index);
  std::vector<std::unique_ptr<Scratch<E>>> scratch(std::min<int64_t>(p.threads, p.hk * parts.count()));
  for (auto& s : scratch) s = std::make_unique<Scratch<E>>(p.d, p.dv);
  int64_t of_element = in.narrow ? (int64_t)sizeof(T) : 4;
  auto prepare = [&](void* data, int64_t rows, int64_t columns, bool keep) {
    int64_t row = columns * of_element, size = rows * row;
    if (!keep) prefer_large_pages(data, size);
    return to_stream(data, row, size);
  };
  bool stream_q = prepare(in.dq, p.num_q * p.hq, p.d, in.add_to_dq);
  bool stream_k = prepare(in.dk, p.num_k * p.hk, p.d, false), stream_v = prepare(in.dv, p.num_k * p.hk, p.dv, false);
  parts.clear();
  int64_t heads = parts.heads_together(), groups = p.hk / heads;
  parallel(parts.count() * groups, p.threads, [&](int64_t task, int worker) {
    Kernel<T, D, E> kernel{p, in, blocks, index, parts, *scratch[worker], stream_q, stream_k, stream_v};
    Range own = parts.blocks(task / groups);
    int64_t first = task % groups * heads, count = (own.end - own.begin) * heads;
    auto unit = [&](int64_t i) { return Unit{own.begin + i / heads, first + i % heads}; };
    for (int64_t i = 0; i < count; i++) {
      Unit next = unit(i + 1);
      kernel.run(unit(i), i + 1 < count ? &next : nullptr);
    }
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
