// Attention over a band table: what the C interface hands to the kernels.
//
// Shapes: num_q, num_k tokens; hq, hk heads, hq % hk == 0; d, dv head dims. Tensors have strides for tokens and heads, in elements; the last axis
// is contiguous. A band row is (q0, q1, k0, k1, lo, hi): cell (i, j) of its rectangle is attended when lo <= j - i <= hi.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <tuple>
#include <vector>

#include "simd.h"

struct Band { int64_t q0, q1, k0, k1, lo, hi; };

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The least that holds both.
static inline Range join(const Range& x, const Range& y) { return {std::min(x.begin, y.begin), std::max(x.end, y.end)}; }

struct View {  // [tokens, heads, columns]
  const void* data;
  int64_t token, head;
};

struct Problem {
  View q, k, v;
  int64_t num_q, num_k, hq, hk, d, dv;
  float scale, softcap;
  const Band* bands;
  int64_t num_bands;
  int32_t dtype;  // of q, k, v: 0 float, 1 bfloat16, 2 half
  int32_t threads;
};

struct ForwardOutput {
  float* out_wide;   // float [num_q, hq, dv]: merged into where `merge`, else written; or null
  void* out_narrow;  // the same in q's dtype; or null
  float* lse;        // [num_q, hq]
  float* max_logits; // [hq], merged into where `merge`; or null
  int32_t merge;
};

struct BackwardInput {
  View dout;
  int32_t dout_dtype;
  const float *lse, *delta;  // [num_q, hq]
  void *dq, *dk, *dv;        // contiguous, [tokens, heads, columns], in float or, where `narrow`, q's dtype
  int32_t narrow;
  int32_t add_to_dq;         // else dq is written; not where `narrow`
};

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Runs task(index, worker) for every index in [0, count), each once, in rising order of start, about. Which worker takes which is not determined;
// tasks share no output, so results are. Tasks must not throw: on another thread nothing would catch it.
template <class Task>
static void parallel(int64_t count, int threads, Task&& task) {
  // Where there are many, a worker takes a few at a time: a counter that threads share waits for all that was written before.
  int64_t few = std::min<int64_t>(std::max<int64_t>(count / (64 * threads), 1), 16);
  std::atomic<int64_t> next{0};
  auto work = [&](int worker) {
    for (int64_t first; (first = next.fetch_add(few)) < count;)
      for (int64_t i = first; i < std::min(first + few, count); i++) task(i, worker);
    finish_streams();
  };
  int64_t extra = std::min<int64_t>(threads, count) - 1;
  std::vector<std::thread> others;
  others.reserve(std::max<int64_t>(extra, 0));
  try {
    for (int64_t w = 1; w <= extra; w++) others.emplace_back(work, (int)w);
  } catch (const std::system_error&) {
    // The system gives no more threads: those there are do the work.
  }
  work(0);
  for (auto& t : others) t.join();
}

// Memory that was just allocated and will be written: where it is large, in large pages. The system hands out small ones at a tenth of the speed
// at which a core writes.
static inline void prefer_large_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 1 << 21;
  uintptr_t begin = ((uintptr_t)data + page - 1) / page * page, end = ((uintptr_t)data + bytes) / page * page;
  if (begin + 2 * page <= end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // where it fails, pages are small
#else
  (void)data, (void)bytes;
#endif
}

// Memory that is not initialised, aligned to a cache line.
struct Buffer {
  float* data = nullptr;
  explicit Buffer(size_t count) : data((float*)::operator new(count * 4 + 64, std::align_val_t(64))) { prefer_large_pages(data, count * 4); }
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator float*() const { return data; }
};

// Rows of queries are (query, head), the heads that share one of keys side by side. Tiles of them meet blocks of at most BLOCK_K keys, a multiple
// of NR: K and V blocks of 256 x 128 floats stay in the second-level cache.
constexpr int BLOCK_K = 256;

// Tiles of the backward (those of the forward are in lanes.h) have at most TILE_ROWS rows, a multiple of MR. Rows of their scores are LEAD apart:
// not a power of two, so that a column of them falls into different cache sets.
constexpr int TILE_ROWS = 60, LEAD = BLOCK_K + 16;
// Where a band has at most FEW_KEYS of a block, a tile's scores stay in the first-level cache for more rows: whole documents, whose dk and dv then
// are no sums.
constexpr int FEW_KEYS = 64, MOST_ROWS = 132;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void forward(const Problem& p, const ForwardOutput& o);
void backward(const Problem& p, const BackwardInput& in);
