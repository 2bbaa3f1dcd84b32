// The partitions of the keys whose backwards run side by side, and where each adds its dq.
//
// Of the partitions that reach a tile of queries, the first adds to the caller's dq (or, where that is to be in a narrower type, to one in float);
// the others to buffers of their own, which are added to it at the end, in order. So masks of documents or of a window need next to no buffers.
#pragma once
#include "attention.h"
#include "bands.h"
#include "elements.h"

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The queries of a band that may attend something in a block of keys.
static inline Range queries_of(const Problem& p, const Band& band, int64_t block) {
  int64_t k0 = std::max(block * BLOCK_K, band.k0), k1 = std::min({(block + 1) * BLOCK_K, band.k1, p.num_k});
  return {std::max(band.q0, k0 - band.hi), std::min(band.q1, k1 - band.lo)};
}

class Partitions {
 public:
  static constexpr int64_t UNITS_WANTED = 32;   // kv heads x partitions: enough to balance many threads
  static constexpr int64_t BUFFERS_ALLOWED = 3; // all partitions' buffers, in multiples of a dq in float

  Partitions(const Problem& p, const BackwardInput& in, const TileBands& index) : p(p), in(in), index(index) {
    int64_t blocks = (int64_t)index.first.size() - 1;
    measure(blocks);
    for (int64_t wanted = std::min(blocks, ceil_div(UNITS_WANTED, p.hk)); wanted > 0; wanted = wanted > 8 ? wanted / 2 : wanted - 1) {
      divide(blocks, wanted);
      if (buffer_rows() <= BUFFERS_ALLOWED * p.num_q) break;
    }
    if (in.narrow) wide = std::make_unique<Buffer>(p.num_q * p.hq * p.d);
    dq = in.narrow ? wide->data : (float*)in.dq;
    for (const Range& x : buffered) buffers.push_back(x.empty() ? nullptr : std::make_unique<Buffer>((x.end - x.begin) * p.hq * p.d));
  }

  int64_t count() const { return (int64_t)borders.size() - 1; }
  Range blocks(int64_t part) const { return {borders[part], borders[part + 1]}; }
  int64_t of_block(int64_t block) const { return std::upper_bound(borders.begin(), borders.end() - 1, block) - borders.begin() - 1; }

  // Where a partition adds its dq of one query of one head.
  float* dq_row(int64_t part, int64_t query, int64_t head) const {
    if (owner[query / TILE_Q] == part) return dq + (query * p.hq + head) * p.d;
    return *buffers[part] + ((query - buffered[part].begin) * p.hq + head) * p.d;
  }

  void clear() const {
    constexpr int64_t at_once = 1 << 16;
    auto zero = [&](float* data, int64_t size) {
      parallel(ceil_div(size, at_once), p.threads, [&](int64_t i, int) {
        std::fill(data + i * at_once, data + std::min(size, (i + 1) * at_once), 0.f);
      });
    };
    if (!in.add_to_dq) zero(dq, p.num_q * p.hq * p.d);
    for (int64_t part = 0; part < count(); part++)
      if (buffers[part]) zero(*buffers[part], (buffered[part].end - buffered[part].begin) * p.hq * p.d);
  }

  template <class T>
  void add_up() const {
    int64_t width = p.hq * p.d;
    parallel((int64_t)owner.size(), p.threads, [&](int64_t tile, int) {
      for (int64_t part = 0; part < count(); part++) {
        if (owner[tile] == part) continue;
        int64_t begin = std::max(tile * TILE_Q, buffered[part].begin), end = std::min((tile + 1) * TILE_Q, buffered[part].end);
        if (begin >= end) continue;
        const float* src = *buffers[part] + (begin - buffered[part].begin) * width;
        float* dst = dq + begin * width;
        for (int64_t i = 0; i < (end - begin) * width; i++) dst[i] += src[i];
      }
      if (in.narrow) narrow_row(dq + tile * TILE_Q * width, std::min<int64_t>(TILE_Q, p.num_q - tile * TILE_Q) * width, (T*)in.dq + tile * TILE_Q * width);
    });
  }

 private:
  const Problem& p;
  const BackwardInput& in;
  const TileBands& index;
  std::vector<double> work;       // of all blocks before each
  std::vector<int64_t> borders;   // of partitions, in blocks
  std::vector<int64_t> owner;     // of tiles of queries: the first partition that reaches it, or -1
  std::vector<Range> buffered;    // queries of tiles that a partition reaches and does not own
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::unique_ptr<Buffer> wide;
  float* dq;

  template <class Act>
  void each_range(int64_t block, Act&& act) const {
    for (int64_t x = index.first[block]; x < index.first[block + 1]; x++) {
      Range q = queries_of(p, p.bands[index.list[x]], block);
      if (!q.empty()) act(q);
    }
  }

  void measure(int64_t blocks) {
    work.assign(blocks + 1, 0.0);
    for (int64_t b = 0; b < blocks; b++) {
      double queries = 1;
      each_range(b, [&](Range q) { queries += (double)(q.end - q.begin); });
      work[b + 1] = work[b] + queries;
    }
  }

  // Partitions of about equal work.
  void divide(int64_t blocks, int64_t parts) {
    borders.assign(parts + 1, blocks);
    for (int64_t i = 0, b = 0; i < parts; i++) {
      while (b < blocks && work[b] < work[blocks] * (double)i / (double)parts) b++;
      borders[i] = b;
    }
    owner.assign(ceil_div(p.num_q, TILE_Q), -1);
    buffered.assign(parts, {p.num_q, 0});
    for (int64_t part = 0; part < parts; part++) {
      Range& to = buffered[part];
      for (int64_t b = borders[part]; b < borders[part + 1]; b++)
        each_range(b, [&](Range q) {
          for (int64_t tile = q.begin / TILE_Q; tile * TILE_Q < q.end; tile++) {
            if (owner[tile] < 0) owner[tile] = part;
            if (owner[tile] == part) continue;
            to.begin = std::min(to.begin, tile * TILE_Q), to.end = std::max(to.end, std::min(p.num_q, (tile + 1) * TILE_Q));
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
