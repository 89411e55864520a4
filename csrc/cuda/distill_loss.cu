// Divergences of a student's distribution to its teacher's, row by row: what
// csrc/cpu/distill_loss.cpp computes. Never run on a GPU: compiled for sm_90a and emulated.
#include <type_traits>

#include "kernels.h"
#include "rows.h"

namespace q3mega::cuda {
namespace {

using sm90::launch;

// ln of beta p + (1 - beta) q; of 0 a finite number, so that 0 times it is 0.
__device__ float log_mixture(float p, float q, float beta) {
  return logf(fmaxf(beta * p + (1.0f - beta) * q, 1e-37f));
}

template <Divergence kind>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    divergence_sums_kernel(const float* __restrict__ student, const float* __restrict__ teacher,
                           int64_t stride, int64_t columns, const float* __restrict__ lse_student,
                           const float* __restrict__ lse_teacher, float beta,
                           float* __restrict__ sums) {
  const int64_t row = blockIdx.x;
  const float *s = student + row * stride, *t = teacher + row * stride;
  const float shift_s = lse_student[row], shift_t = lse_teacher[row];
  float sum[2] = {0.0f, 0.0f};
  for_columns(s, t, columns, [&](int64_t v, auto& x) {
    std::remove_reference_t<decltype(x)> y;
    load(x, s + v);
    load(y, t + v);
    for (unsigned i = 0; i < sizeof(x) / sizeof(float); ++i) {
      const float lq = x[i] - shift_s, lp = y[i] - shift_t;
      if constexpr (kind == kForward) {
        sum[0] += expf(lp) * (lp - lq);
      } else if constexpr (kind == kReverse) {
        sum[0] += expf(lq) * (lq - lp);
      } else {
        const float q = expf(lq), p = expf(lp), lm = log_mixture(p, q, beta);
        sum[0] += p * (lp - lm);
        sum[1] += q * (lq - lm);
      }
    }
  });
  reduce(sum, [](auto& x, auto& y) {
    x[0] += y[0];
    x[1] += y[1];
  });
  if (threadIdx.x == 0) {
    sums[2 * row] = sum[0];
    sums[2 * row + 1] = sum[1];
  }
}

template <Divergence kind>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    divergence_gradient_kernel(float* __restrict__ student, const float* __restrict__ teacher,
                               int64_t stride, int64_t columns,
                               const float* __restrict__ lse_student,
                               const float* __restrict__ lse_teacher, float beta,
                               const float* __restrict__ student_part,
                               const float* __restrict__ g) {
  const int64_t row = blockIdx.x;
  float* s = student + row * stride;
  const float* t = teacher + row * stride;
  const float shift_s = lse_student[row], shift_t = lse_teacher[row];
  const float mean = student_part[row], factor = g[row];
  for_columns(s, t, stride, [&](int64_t v, auto& x) {
    std::remove_reference_t<decltype(x)> y;
    load(x, s + v);
    load(y, t + v);
    for (unsigned i = 0; i < sizeof(x) / sizeof(float); ++i) {
      const float lq = x[i] - shift_s, lp = y[i] - shift_t, q = expf(lq);
      float dz;
      if constexpr (kind == kForward) {
        dz = factor * (q - expf(lp));
      } else if constexpr (kind == kReverse) {
        dz = factor * q * (lq - lp - mean);
      } else {
        dz = factor * (1.0f - beta) * q * (lq - log_mixture(expf(lp), q, beta) - mean);
      }
      x[i] = v + i < columns ? dz : 0.0f;
    }
    store(s + v, x);
  });
}

// launch(kind) with the kind known to the compiler.
template <class Launch>
cudaError_t for_kind(Divergence kind, const Launch& launch) {
  switch (kind) {
    case kForward:
      return launch(std::integral_constant<Divergence, kForward>());
    case kReverse:
      return launch(std::integral_constant<Divergence, kReverse>());
    case kJsd:
      return launch(std::integral_constant<Divergence, kJsd>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t divergence_sums(const float* student, const float* teacher, int64_t rows,
                            int64_t stride, int64_t columns, const float* lse_student,
                            const float* lse_teacher, Divergence kind, float beta, float* sums,
                            cudaStream_t stream) {
  return for_kind(kind, [&](auto known) {
    return launch(divergence_sums_kernel<known>, rows, kRowThreads, kReduceBytes<2>, stream,
                  student, teacher, stride, columns, lse_student, lse_teacher, beta, sums);
  });
}

cudaError_t divergence_gradient(float* student, const float* teacher, int64_t rows, int64_t stride,
                                int64_t columns, const float* lse_student, const float* lse_teacher,
                                Divergence kind, float beta, const float* student_part,
                                const float* g, cudaStream_t stream) {
  return for_kind(kind, [&](auto known) {
    return launch(divergence_gradient_kernel<known>, rows, kRowThreads, 0, stream, student, teacher,
                  stride, columns, lse_student, lse_teacher, beta, student_part, g);
  });
}

}  // namespace q3mega::cuda
