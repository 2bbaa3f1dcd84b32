// The C interface. Structures are passed as they are declared in attention.h; every function returns 0, or 1 where memory ran out.
#include <new>

#include "attention.h"
#include "simd.h"

template <class Run>
static int guarded(Run&& run) {
  try {
    run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

extern "C" int magi_cpu_forward(const Problem* p, const ForwardOutput* o) {
  return guarded([&] { forward(*p, *o); });
}

extern "C" int magi_cpu_backward(const Problem* p, const BackwardInput* in) {
  return guarded([&] { backward(*p, *in); });
}

extern "C" int magi_cpu_vector_lanes() { return VL; }
