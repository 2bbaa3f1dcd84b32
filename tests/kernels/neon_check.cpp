// The CPU kernel beside sums in double, for processors that tests cannot run on otherwise. Returns how many cases are off.
#include <cmath>
#include <cstdio>
#include <random>

#include "attention.h"
#include "product.h"

extern "C" int magi_cpu_forward(const Problem*, const ForwardOutput*);
extern "C" int magi_cpu_backward(const Problem*, const BackwardInput*);

constexpr int HQ = 4, HK = 2;
typedef std::vector<double> Doubles;

// The largest error, relative to the largest true value.
static double error(const std::vector<float>& actual, const Doubles& exact) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < exact.size(); i++) {
    worst = std::max(worst, std::isnan(actual[i]) ? INFINITY : std::abs(actual[i] - exact[i]));
    largest = std::max(largest, std::abs(exact[i]));
  }
  return worst / largest;
}

template <class T>
static bool is_exact(int dtype, int tokens, int d) {
  std::mt19937 bits(1);
  std::normal_distribution<float> normal;
  auto random = [&](int heads) {
    std::vector<T> x(tokens * heads * d);
    for (T& value : x) narrow(normal(bits), &value);
    return x;
  };
  auto q = random(HQ), k = random(HK), v = random(HK), dout = random(HQ);
  const Band bands[] = {{0, 37, 0, 37, -1000, 0}, {37, tokens, 20, tokens, -60, 5}};
  Problem p{{q.data(), HQ * d, d}, {k.data(), HK * d, d}, {v.data(), HK * d, d}, tokens, tokens, HQ, HK, d, d, 1 / std::sqrt((float)d), 0,
            bands, 2, dtype, 2};
  Doubles out(q.size()), lse(tokens * HQ), dq(q.size()), dk(k.size()), dv(v.size());
  std::vector<float> delta(tokens * HQ);
  auto dot = [&](const T* a, const T* b) {
    double sum = 0;
    for (int c = 0; c < d; c++) sum += (double)widen(a[c]) * widen(b[c]);
    return sum;
  };
  for (const Band& band : bands)
    for (int64_t i = band.q0; i < band.q1; i++)
      for (int h = 0; h < HQ; h++) {
        int64_t at = i * HQ + h, row = at * d, begin = std::max(band.k0, i + band.lo), end = std::min(band.k1, i + band.hi + 1);
        auto key = [&](int64_t j) { return (j * HK + h / (HQ / HK)) * d; };
        double total = 0, sum = 0;
        for (int64_t j = begin; j < end; j++) total += std::exp(dot(&q[row], &k[key(j)]) * p.scale);
        lse[at] = std::log(total);
        auto prob = [&](int64_t j) { return std::exp(dot(&q[row], &k[key(j)]) * p.scale - lse[at]); };
        for (int64_t j = begin; j < end; j++)
          for (int c = 0; c < d; c++) out[row + c] += prob(j) * widen(v[key(j) + c]);
        for (int c = 0; c < d; c++) sum += out[row + c] * widen(dout[row + c]);
        delta[at] = (float)sum;
        for (int64_t j = begin; j < end; j++) {
          double of_key = prob(j), of_score = of_key * (dot(&dout[row], &v[key(j)]) - sum) * p.scale;
          for (int c = 0; c < d; c++) {
            dv[key(j) + c] += of_key * widen(dout[row + c]);
            dq[row + c] += of_score * widen(k[key(j) + c]);
            dk[key(j) + c] += of_score * widen(q[row + c]);
          }
        }
      }
  std::vector<float> own_out(out.size()), own_lse(lse.size()), own_dq(dq.size()), own_dk(dk.size()), own_dv(dv.size());
  ForwardOutput output{own_out.data(), nullptr, own_lse.data(), nullptr, 0};
  BackwardInput input{{dout.data(), HQ * d, d}, dtype, own_lse.data(), delta.data(), own_dq.data(), own_dk.data(), own_dv.data(), 0, 0};
  if (magi_cpu_forward(&p, &output) || magi_cpu_backward(&p, &input)) return false;
  double errors[] = {error(own_out, out), error(own_dq, dq), error(own_dk, dk), error(own_dv, dv), error(own_lse, lse)};
  // Probabilities are rounded to the type of the words: 8 bits of bfloat16.
  double allowed = ProductOf<T>::type::n == 2 ? 0x1p-7 : 3e-6;
  std::printf("dtype %d, %d tokens, head_dim %d: %.1e %.1e %.1e %.1e, lse %.1e\n", dtype, tokens, d, errors[0], errors[1], errors[2], errors[3],
              errors[4]);
  return *std::max_element(errors, errors + 4) <= allowed && errors[4] <= 3e-6;
}

int main() {
  std::printf("%d lanes, bfloat16 %s a word\n", VL, ProductOf<bf16>::type::n == 2 ? "two" : "one");
  int wrong = 0;
  for (int tokens : {97, 331})
    for (int d : {7, 40, 64}) wrong += !is_exact<float>(0, tokens, d) + !is_exact<bf16>(1, tokens, d) + !is_exact<fp16>(2, tokens, d);
  return wrong;
}
