// Which cells of a tile of rows and a block of keys a band attends, and how the axes are cut into tiles and blocks.
#pragma once
#include "attention.h"
#include "simd.h"

static_assert(TILE_ROWS % MR == 0 && MOST_ROWS % MR == 0 && MR % 2 == 0 && BLOCK_K % NR == 0);

// Columns of a block of keys, counted from its beginning.
struct Span { int begin, end; };

// What a strip of at most MR rows attends of one block of keys.
struct Strip {
  int row, rows, begin, end;
  int first() const { return begin / VL * VL; }
  int last() const { return (end + VL - 1) / VL * VL; }
};

// The queries of a band that attend something in a block of keys.
static inline Range queries_of(const Band& band, const Range& keys) {
  int64_t k0 = std::max(keys.begin, band.k0), k1 = std::min(keys.end, band.k1);
  return {std::max(band.q0, k0 - band.hi), std::min(band.q1, k1 - band.lo)};
}

// A band cut to a tile of rows and a block of keys. Row 0 is the head `skipped` of query `a`.
struct BandTile {
  const Band& band;
  int64_t a;
  int skipped, rows, group;
  Range keys;

  int64_t query(int row) const { return a + (unsigned)(skipped + row) / (unsigned)group; }
  // What a query attends, from the block's beginning.
  int left(int64_t q) const { return (int)(std::max({band.k0, q + band.lo, keys.begin}) - keys.begin); }
  int right(int64_t q) const { return (int)(std::min({band.k1, q + band.hi + 1, keys.end}) - keys.begin); }
  // What any of its rows does: first to last, as rows go on.
  Range attended() const { return {left(a), right(query(rows - 1))}; }
};

// The strips of a tile of rows, which all attend something, and what each row attends.
struct Strips {
  int count = 0;
  Strip at[MOST_ROWS / MR];
  Span rows[MOST_ROWS];

  explicit Strips(const BandTile& x) {
    int64_t q = x.a;
    for (int row = 0, h = x.skipped; row < x.rows; q++, h = 0)
      for (Span span{x.left(q), x.right(q)}; h < x.group && row < x.rows; h++, row++) rows[row] = span;
    for (int row = 0; row < x.rows; row += MR) {
      int end = std::min(row + MR, x.rows);
      at[count++] = {row, end - row, rows[row].begin, rows[end - 1].end};
    }
  }
  const Strip* begin() const { return at; }
  const Strip* end() const { return at + count; }
};

// act(BandTile) for the tiles of rows of queries [a, b), which all attend something, in order.
template <class Act>
static inline void each_tile(const Band& band, int64_t a, int64_t b, int64_t group, const Range& keys, Act&& act) {
  int64_t most = std::min(band.k1, keys.end) - std::max(band.k0, keys.begin) <= FEW_KEYS ? MOST_ROWS : TILE_ROWS;
  for (int64_t row = 0, rows = (b - a) * group; row < rows; row += most)
    act(BandTile{band, a + row / group, (int)(row % group), (int)std::min(most, rows - row), (int)group, keys});
}

// For each panel of columns in turn, which stays in the first-level cache, the strips that attend some of it: act(column, vectors, strip).
template <class Act>
static inline void each_panel(const Strips& strips, Act&& act) {
  int first = BLOCK_K, last = 0;
  for (const Strip& x : strips) first = std::min(first, x.first()), last = std::max(last, x.last());
  for (int panel = first / NR * NR; panel < last; panel += NR)
    for (const Strip& x : strips) {
      int begin = std::max(panel, x.first()), end = std::min(panel + NR, x.last());
      if (begin < end) act(begin, (end - begin) / VL, x);
    }
}

// Positions in order, asked for further and further on.
class Ascending {
 public:
  explicit Ascending(const std::vector<int64_t>& all) : at(all.begin()), end(all.end()) {}
  // The first one from a position on, or what is further than all.
  int64_t from(int64_t position) {
    while (at != end && *at < position) ++at;
    return at == end ? INT64_MAX : *at;
  }

 private:
  std::vector<int64_t>::const_iterator at, end;
};

// Where documents begin along an axis, in order: bands that share neither queries nor keys with the document before.
static inline std::vector<int64_t> find_documents(const Problem& p, bool of_queries) {
  struct Area { Range along, across; };  // along the axis, and along the other
  std::vector<Area> areas;
  for (int64_t b = 0; b < p.num_bands; b++) {
    const Band& x = p.bands[b];
    Range queries{x.q0, x.q1}, keys{x.k0, x.k1};
    if (!queries.empty() && !keys.empty()) areas.push_back(of_queries ? Area{queries, keys} : Area{keys, queries});
  }
  auto before = [](const Area& x, const Area& y) { return x.along.begin < y.along.begin; };
  if (!std::is_sorted(areas.begin(), areas.end(), before)) std::sort(areas.begin(), areas.end(), before);
  std::vector<int64_t> begins;
  Area document{{0, 0}, {0, 0}};
  for (const Area& x : areas) {
    bool apart = x.along.begin >= document.along.end && (x.across.begin >= document.across.end || x.across.end <= document.across.begin);
    if (apart) begins.push_back(x.along.begin), document = x;
    else document = {join(document.along, x.along), join(document.across, x.across)};
  }
  return begins;
}

// An axis of tokens in pieces of at most `most`. A piece ends where the last band in its reach ends, if it is then longer than half of `most`, or if
// the band that follows fits one piece: so short bands stay whole. And it ends where one of `documents` begins, once it has `enough`.
class Pieces {
 public:
  Pieces(const Problem& p, bool of_queries, int64_t most, const std::vector<int64_t>& documents = {}, int64_t enough = 0) {
    int64_t length = of_queries ? p.num_q : p.num_k;
    std::vector<int64_t> ends;
    for (int64_t b = 0; b < p.num_bands; b++) {
      const Band& x = p.bands[b];
      for (int64_t at : {of_queries ? x.q0 : x.k0, of_queries ? x.q1 : x.k1})
        if (ends.empty() || ends.back() != at) ends.push_back(at);
    }
    std::sort(ends.begin(), ends.end());
    auto next = ends.begin();
    Ascending begins(documents);
    for (int64_t at = 0; at < length;) {
      borders.push_back(at);
      int64_t end = std::min(at + most, length), whole = at;
      while (next != ends.end() && *next <= at) ++next;
      auto beyond = next;
      for (; beyond != ends.end() && *beyond <= end; ++beyond) whole = *beyond;
      bool next_stays_whole = whole > at && beyond != ends.end() && *beyond - whole <= most;
      if (end < length && (whole > at + most / 2 || next_stays_whole)) end = whole;
      at = std::min(end, begins.from(at + enough));
    }
    borders.push_back(length);
    near.reserve(length / APART + 1);
    for (int64_t token = 0, piece = 0; token < length; token += APART) {
      while (borders[piece + 1] <= token) piece++;
      near.push_back(piece);
    }
  }

  int64_t count() const { return (int64_t)borders.size() - 1; }
  Range operator[](int64_t piece) const { return {borders[piece], borders[piece + 1]}; }
  // The piece that holds a token.
  int64_t of(int64_t token) const {
    int64_t piece = near[token / APART];
    while (borders[piece + 1] <= token) piece++;
    return piece;
  }

 private:
  static constexpr int64_t APART = 64;
  std::vector<int64_t> borders, near;  // near: the piece of each token that is a multiple of APART
};

// The bands that meet each piece: those of piece t are list[first[t] .. first[t + 1]).
struct PieceBands {
  std::vector<int64_t> first, list;
  PieceBands(const Problem& p, bool of_queries, const Pieces& pieces) {
    first.assign(pieces.count() + 1, 0);
    auto each = [&](auto&& act) {
      for (int64_t b = 0; b < p.num_bands; b++) {
        const Band& x = p.bands[b];
        int64_t begin = of_queries ? x.q0 : x.k0, end = of_queries ? x.q1 : x.k1;
        if (begin >= end) continue;
        for (int64_t t = pieces.of(begin); t < pieces.count() && pieces[t].begin < end; t++) act(t, b);
      }
    };
    each([&](int64_t t, int64_t) { first[t + 1]++; });
    for (int64_t t = 0; t < pieces.count(); t++) first[t + 1] += first[t];
    list.resize(first.back());
    std::vector<int64_t> at(first.begin(), first.end() - 1);
    each([&](int64_t t, int64_t b) { list[at[t]++] = b; });
  }
};
