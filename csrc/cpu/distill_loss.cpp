// Divergences of a student's distribution to its teacher's, row by row.
#include "distill_loss.h"

#include "rows.h"

namespace q3mega {
namespace {

// sum over the columns of term(ln q, ln p, z), two numbers a column; blocks are summed in double.
// z is the teacher's logit, which a term may overwrite.
template <class Term>
void sum_terms(const float* s, float* t, int64_t columns, float lse_s, float lse_t,
               const Term& term, float* sums) {
  double first = 0.0, second = 0.0;
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t end = std::min(start + kBlock, columns);
    float a = 0.0f, b = 0.0f;
#pragma omp simd reduction(+ : a, b)
    for (int64_t v = start; v < end; ++v) {
      float x, y;
      term(s[v] - lse_s, t[v] - lse_t, t[v], x, y);
      a += x;
      b += y;
    }
    first += a;
    second += b;
  }
  sums[0] = static_cast<float>(first);
  sums[1] = static_cast<float>(second);
}

}  // namespace

void divergence_sums(const float* student, float* teacher, int64_t rows, int64_t stride,
                     int64_t columns, const float* lse_student, const float* lse_teacher,
                     Divergence kind, float beta, float* sums) {
  const auto forward = [](float lq, float lp, float&, float& x, float& y) {
    x = exp_fast(lp) * (lp - lq);
    y = 0.0f;
  };
  const auto reverse = [](float lq, float lp, float&, float& x, float& y) {
    x = exp_fast(lq) * (lq - lp);
    y = 0.0f;
  };
  const auto jsd = [beta](float lq, float lp, float& z, float& x, float& y) {
    const float q = exp_fast(lq), p = exp_fast(lp);
    const float lm = log_fast(beta * p + (1.0f - beta) * q);
    x = p * (lp - lm);
    y = q * (lq - lm);
    z = lq - lm;
  };
  for_rows(rows, [=](int64_t row) {
    const float* s = student + row * stride;
    float* t = teacher + row * stride;
    const float a = lse_student[row], b = lse_teacher[row];
    float* out = sums + 2 * row;
    if (kind == kForward) {
      sum_terms(s, t, columns, a, b, forward, out);
    } else if (kind == kReverse) {
      sum_terms(s, t, columns, a, b, reverse, out);
    } else {
      sum_terms(s, t, columns, a, b, jsd, out);
    }
  });
}

void divergence_gradient(float* student, const float* teacher, int64_t rows, int64_t stride,
                         int64_t columns, const float* lse_student, const float* lse_teacher,
                         Divergence kind, float beta, const float* own, const float* g) {
  for_rows(rows, [=](int64_t row) {
    float* s = student + row * stride;
    const float* t = teacher + row * stride;
    const float a = lse_student[row], b = lse_teacher[row], mean = own[row], scale = g[row];
    if (kind == kForward) {
#pragma omp simd
      for (int64_t v = 0; v < columns; ++v) {
        s[v] = scale * (exp_fast(s[v] - a) - exp_fast(t[v] - b));
      }
    } else if (kind == kReverse) {
#pragma omp simd
      for (int64_t v = 0; v < columns; ++v) {
        const float lq = s[v] - a;
        s[v] = scale * exp_fast(lq) * (lq - (t[v] - b) - mean);
      }
    } else {
      const float share = scale * (1.0f - beta);
#pragma omp simd
      for (int64_t v = 0; v < columns; ++v) {
        s[v] = share * exp_fast(s[v] - a) * (t[v] - mean);
      }
    }
    std::fill(s + columns, s + stride, 0.0f);
  });
}

}  // namespace q3mega
