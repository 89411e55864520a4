// Softmax statistics of a block of logits, and the gradient of log-probability and entropy.
#include "linear_logprob.h"

#include <cmath>

#include "rows.h"

namespace q3mega {

void row_stats(const float* logits, int64_t rows, int64_t stride, int64_t columns,
               const int64_t* column, float* stats) {
  for_rows(rows, [=](int64_t row) {
    const float* z = logits + row * stride;
    float top = -1e30f;
    double mass = 0.0, moment = 0.0;
    for (int64_t start = 0; start < columns; start += kBlock) {  // in the cache between its loops
      const int64_t end = std::min(start + kBlock, columns);
      fetch_ahead(start, z);
      const float best = maximum(z + start, end - start, top);
      if (best > top) {
        const double shift = static_cast<double>(top) - best, shrink = std::exp(shift);
        moment = shrink * (moment + mass * shift);
        mass *= shrink;
        top = best;
      }
      float s = 0.0f, t = 0.0f;
#pragma omp simd reduction(+ : s, t)
      for (int64_t v = start; v < end; ++v) {
        const float d = z[v] - top;
        const float e = exp_fast(d);
        s += e;
        t += e * d;
      }
      mass += s;
      moment += t;
    }
    const int64_t target = column[row];
    float* out = stats + 4 * row;
    out[0] = top;
    out[1] = static_cast<float>(mass);
    out[2] = static_cast<float>(moment);
    out[3] = target >= 0 && target < columns ? z[target] : 0.0f;
  });
}

void row_gradient(float* logits, int64_t rows, int64_t stride, int64_t columns,
                  const int64_t* column, const float* lse, const float* entropy,
                  const float* g_logprob, const float* g_entropy) {
  for_rows(rows, [=](int64_t row) {
    float* z = logits + row * stride;
    const float shift = lse[row], g = g_logprob[row], h = entropy[row];
    const float gh = g_entropy == nullptr ? 0.0f : g_entropy[row];
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t end = std::min(start + kBlock, columns);
      fetch_ahead(start, z);
#pragma omp simd
      for (int64_t v = start; v < end; ++v) {
        const float lp = z[v] - shift;
        z[v] = -exp_fast(lp) * (g + gh * (lp + h));
      }
    }
    std::fill(z + columns, z + stride, 0.0f);
    const int64_t target = column[row];
    if (target >= 0 && target < columns) {
      z[target] += g;
    }
  });
}

}  // namespace q3mega
