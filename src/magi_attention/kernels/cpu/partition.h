// The partitions of the keys whose backwards run side by side, and where each adds its dq.
//
// Of the partitions that reach a tile of queries, the first adds to the caller's dq (or, where that is to be in a narrower type, to one in float);
// the others to buffers of their own, which are added to it at the end, in order. So masks of documents or of a window need next to no buffers.
//
// A query that one band attends by one block of keys alone is written once, as the caller wants it, and is no matter of sums at all.
#pragma once
#include "attention.h"
#include "bands.h"
#include "elements.h"

class Partitions {
 public:
  static constexpr int64_t UNITS_WANTED = 32;       // kv heads x partitions: enough to balance many threads
  static constexpr int64_t PARTITIONS_WANTED = 32;  // where none needs a buffer
  static constexpr int64_t WANTED_PER_THREAD = 8;   // of those
  static constexpr int64_t BUFFERS_ALLOWED = 3;     // all partitions' buffers, in multiples of a dq in float

  Partitions(const Problem& p, const BackwardInput& in, const Pieces& pieces, const PieceBands& index)
      : p(p), in(in), pieces(pieces), index(index) {
    measure();
    // What decides here must not depend on the threads: partitions with buffers add up in another order than those without.
    int64_t some = std::min(pieces.count(), PARTITIONS_WANTED), more = std::min(pieces.count(), WANTED_PER_THREAD * p.threads);
    divide(some);
    if (buffer_rows() > 0) {
      for (int64_t wanted = std::min(pieces.count(), ceil_div(UNITS_WANTED, p.hk)); wanted > 0; wanted = wanted > 8 ? wanted / 2 : wanted - 1) {
        divide(wanted);
        if (buffer_rows() <= BUFFERS_ALLOWED * p.num_q) break;
      }
    } else if (more > some) {  // nothing is added up over partitions, and more of them make the same sums if that stays so
      divide(more);
      if (buffer_rows() > 0) divide(some);
    }
    sums = sums_before[p.num_q] > 0;
    if (in.narrow && sums) wide = std::make_unique<Buffer>(p.num_q * p.hq * p.d);
    dq = !in.narrow ? (float*)in.dq : sums ? wide->data : nullptr;
    for (const Range& x : buffered) buffers.push_back(x.empty() ? nullptr : std::make_unique<Buffer>((x.end - x.begin) * p.hq * p.d));
  }

  int64_t count() const { return (int64_t)borders.size() - 1; }
  // How many kv heads of a block are taken one after the other, as their rows lie side by side: all, where there are partitions enough for the
  // threads.
  int64_t heads_together() const { return count() >= WANTED_PER_THREAD * p.threads ? p.hk : 1; }
  Range blocks(int64_t part) const { return {borders[part], borders[part + 1]}; }
  int64_t of_block(int64_t block) const { return std::upper_bound(borders.begin(), borders.end() - 1, block) - borders.begin() - 1; }

  // Whether a query's dq comes as a whole, and is to be written to the caller's.
  bool written_once(int64_t query) const { return times[query] == 1 && !in.add_to_dq; }

  // Where a partition adds its dq of one query of one head.
  float* dq_row(int64_t part, int64_t query, int64_t head) const {
    if (owner[query / OWNED] == part) return dq + (query * p.hq + head) * p.d;
    return *buffers[part] + ((query - buffered[part].begin) * p.hq + head) * p.d;
  }

  void clear() const {
    int64_t width = p.hq * p.d;
    if (sums && !in.add_to_dq) parallel((int64_t)owner.size(), p.threads, [&](int64_t stretch, int) {
      each_sum(stretch, [&](int64_t q) { std::fill_n(dq + q * width, width, 0.f); });
    });
    constexpr int64_t at_once = 1 << 16;
    for (int64_t part = 0; part < count(); part++) {
      int64_t size = (buffered[part].end - buffered[part].begin) * width;
      if (buffers[part]) parallel(ceil_div(size, at_once), p.threads, [&](int64_t i, int) {
        std::fill(*buffers[part] + i * at_once, *buffers[part] + std::min(size, (i + 1) * at_once), 0.f);
      });
    }
  }

  template <class T>
  void add_up() const {
    if (!sums) return;
    int64_t width = p.hq * p.d;
    parallel((int64_t)owner.size(), p.threads, [&](int64_t stretch, int) {
      for (int64_t part = 0; part < count(); part++) {
        if (owner[stretch] == part) continue;
        int64_t begin = std::max(stretch * OWNED, buffered[part].begin), end = std::min((stretch + 1) * OWNED, buffered[part].end);
        for (int64_t q = begin; q < end; q++) {
          if (written_once(q)) continue;
          const float* src = *buffers[part] + (q - buffered[part].begin) * width;
          float* dst = dq + q * width;
          for (int64_t i = 0; i < width; i++) dst[i] += src[i];
        }
      }
      if (in.narrow) each_sum(stretch, [&](int64_t q) { narrow_row(dq + q * width, width, (T*)in.dq + q * width); });
    });
  }

 private:
  static constexpr int64_t OWNED = 64;  // queries of a stretch that a partition owns
  const Problem& p;
  const BackwardInput& in;
  const Pieces& pieces;           // the blocks of keys
  const PieceBands& index;
  std::vector<int32_t> times;     // that something is added to a query's dq
  std::vector<int64_t> sums_before;  // of the queries before one, how many have a dq that is a sum
  bool sums;                      // whether any query's dq is a sum
  std::vector<double> work;       // of all blocks before each
  std::vector<int64_t> borders;   // of partitions, in blocks
  std::vector<int64_t> owner;     // of stretches of queries: the first partition that adds to it, or -1
  std::vector<Range> buffered;    // queries of stretches that a partition adds to and does not own
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::unique_ptr<Buffer> wide;
  float* dq;

  template <class Act>
  void each_range(int64_t block, Act&& act) const {
    for (int64_t x = index.first[block]; x < index.first[block + 1]; x++) {
      Range q = queries_of(p.bands[index.list[x]], pieces[block]);
      if (!q.empty()) act(q);
    }
  }

  // act(query) for those of a stretch whose dq is a sum.
  template <class Act>
  void each_sum(int64_t stretch, Act&& act) const {
    for (int64_t q = stretch * OWNED; q < std::min((stretch + 1) * OWNED, p.num_q); q++)
      if (!written_once(q)) act(q);
  }

  void measure() {
    work.assign(pieces.count() + 1, 0.0);
    times.assign(p.num_q + 1, 0);
    for (int64_t b = 0; b < pieces.count(); b++) {
      double queries = 1;
      each_range(b, [&](Range q) { queries += (double)(q.end - q.begin), times[q.begin]++, times[q.end]--; });
      work[b + 1] = work[b] + queries;
    }
    for (int64_t q = 1; q <= p.num_q; q++) times[q] += times[q - 1];
    sums_before.assign(p.num_q + 1, 0);
    for (int64_t q = 0; q < p.num_q; q++) sums_before[q + 1] = sums_before[q] + !written_once(q);
  }

  // Partitions of about equal work.
  void divide(int64_t parts) {
    int64_t blocks = pieces.count();
    borders.assign(parts + 1, blocks);
    for (int64_t i = 0, b = 0; i < parts; i++) {
      while (b < blocks && work[b] < work[blocks] * (double)i / (double)parts) b++;
      borders[i] = b;
    }
    owner.assign(ceil_div(p.num_q, OWNED), -1);
    buffered.assign(parts, {p.num_q, 0});
    for (int64_t part = 0; part < parts; part++) {
      Range& to = buffered[part];
      for (int64_t b = borders[part]; b < borders[part + 1]; b++)
        each_range(b, [&](Range q) {
          for (int64_t stretch = q.begin / OWNED; stretch * OWNED < q.end; stretch++) {
            int64_t begin = std::max(q.begin, stretch * OWNED), end = std::min(q.end, (stretch + 1) * OWNED);
            if (sums_before[begin] == sums_before[end]) continue;
            if (owner[stretch] < 0) owner[stretch] = part;
            if (owner[stretch] == part) continue;
            to = join(to, {stretch * OWNED, std::min(p.num_q, (stretch + 1) * OWNED)});
          }
        });
    }
  }

  int64_t buffer_rows() const {
    int64_t rows = 0;
    for (const Range& x : buffered) rows += std::max<int64_t>(0, x.end - x.begin);
    return rows;
  }
};
