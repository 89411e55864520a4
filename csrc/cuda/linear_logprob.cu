// Softmax statistics of rows of logits, and the gradient of log-probability and entropy: what
// csrc/cpu/linear_logprob.cpp computes. Never run on a GPU: compiled for sm_90a and emulated.
#include "kernels.h"
#include "rows.h"

namespace q3mega::cuda {
namespace {

using sm90::launch;

constexpr float kNone = -1e30f;  // below every logit, and finite, so that 0 times it is 0

// (m, s, t) = (max z, sum e^(z-m), sum e^(z-m)(z-m)) after another such triple.
__device__ void merge(float (&x)[3], const float (&y)[3]) {
  const float top = fmaxf(x[0], y[0]), a = x[0] - top, b = y[0] - top;
  const float p = expf(a), q = expf(b);
  x[2] = p * (x[2] + x[1] * a) + q * (y[2] + y[1] * b);
  x[1] = p * x[1] + q * y[1];
  x[0] = top;
}

__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    row_stats_kernel(const float* __restrict__ logits, int64_t stride, int64_t columns,
                     const int64_t* __restrict__ column, float* __restrict__ stats) {
  const float* z = logits + blockIdx.x * stride;
  float sums[3] = {kNone, 0.0f, 0.0f};
  for_columns(z, z, columns, [&](int64_t v, auto& x) {
    load(x, z + v);
    float top = sums[0], mass = 0.0f, moment = 0.0f;
    for (const float number : x) {
      top = fmaxf(top, number);
    }
    for (const float number : x) {
      const float d = number - top, e = expf(d);
      mass += e;
      moment += e * d;
    }
    const float down = sums[0] - top, fade = expf(down);
    sums[2] = fade * (sums[2] + sums[1] * down) + moment;
    sums[1] = fade * sums[1] + mass;
    sums[0] = top;
  });
  reduce(sums, [](auto& x, auto& y) { merge(x, y); });
  if (threadIdx.x == 0) {
    const int64_t target = column[blockIdx.x];
    float* out = stats + 4 * static_cast<int64_t>(blockIdx.x);
    out[0] = sums[0];
    out[1] = sums[1];
    out[2] = sums[2];
    out[3] = target >= 0 && target < columns ? z[target] : 0.0f;
  }
}

__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    row_gradient_kernel(float* __restrict__ logits, int64_t stride, int64_t columns,
                        const int64_t* __restrict__ column, const float* __restrict__ lse,
                        const float* __restrict__ entropy, const float* __restrict__ g_logprob,
                        const float* __restrict__ g_entropy) {
  const int64_t row = blockIdx.x, target = column[row];
  float* z = logits + row * stride;
  const float shift = lse[row], h = entropy[row], g = g_logprob[row];
  const float gh = g_entropy == nullptr ? 0.0f : g_entropy[row];
  for_columns(z, z, stride, [&](int64_t v, auto& x) {
    load(x, z + v);
    for (unsigned i = 0; i < sizeof(x) / sizeof(float); ++i) {
      const float lp = x[i] - shift;
      const float dz = (v + i == target ? g : 0.0f) - expf(lp) * (g + gh * (lp + h));
      x[i] = v + i < columns ? dz : 0.0f;
    }
    store(z + v, x);
  });
}

}  // namespace

cudaError_t row_stats(const float* logits, int64_t rows, int64_t stride, int64_t columns,
                      const int64_t* column, float* stats, cudaStream_t stream) {
  return launch(row_stats_kernel, rows, kRowThreads, kReduceBytes<3>, stream, logits, stride,
                columns, column, stats);
}

cudaError_t row_gradient(float* logits, int64_t rows, int64_t stride, int64_t columns,
                         const int64_t* column, const float* lse, const float* entropy,
                         const float* g_logprob, const float* g_entropy, cudaStream_t stream) {
  return launch(row_gradient_kernel, rows, kRowThreads, 0, stream, logits, stride, columns, column,
                lse, entropy, g_logprob, g_entropy);
}

}  // namespace q3mega::cuda
