// Row kernels of the lm-head losses; docs/operators.md has the maths.
#pragma once

#include <cstdint>

namespace q3mega {

// logits (rows, stride), of which `columns` are real; column (rows): the target's, or
// negative. stats (rows, 4): m = max z, sum e^(z-m), sum e^(z-m)(z-m), the target's z (0 if it is
// not here).
void row_stats(const float* logits, int64_t rows, int64_t stride, int64_t columns,
               const int64_t* column, float* stats);

// In place: logits -> g_logprob (1[v = target] - p) - g_entropy p (ln p + entropy), 0 past
// `columns`. All of (rows); g_entropy may be null.
void row_gradient(float* logits, int64_t rows, int64_t stride, int64_t columns,
                  const int64_t* column, const float* lse, const float* entropy,
                  const float* g_logprob, const float* g_entropy);

}  // namespace q3mega
