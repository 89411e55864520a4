// Divergences of a student's distribution to its teacher's, row by row; and logits of a few ids.
#include "distill_loss.h"

#include <omp.h>

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
    fetch_ahead(start, s, t);
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

// s = gradient(s, t), column by column.
template <class Gradient>
void rewrite(float* s, const float* t, int64_t columns, const Gradient& gradient) {
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t end = std::min(start + kBlock, columns);
    fetch_ahead(start, s, t);
#pragma omp simd
    for (int64_t v = start; v < end; ++v) {
      s[v] = gradient(s[v], t[v]);
    }
  }
}

// out += scale * x
inline void add_scaled(float scale, const float* x, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] += scale * x[i];
  }
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
                         Divergence kind, float beta, const float* student_part, const float* g) {
  for_rows(rows, [=](int64_t row) {
    float* s = student + row * stride;
    const float* t = teacher + row * stride;
    const float a = lse_student[row], b = lse_teacher[row], mean = student_part[row],
                scale = g[row];
    if (kind == kForward) {
      rewrite(s, t, columns,
              [=](float z, float y) { return scale * (exp_fast(z - a) - exp_fast(y - b)); });
    } else if (kind == kReverse) {
      rewrite(s, t, columns, [=](float z, float y) {
        const float lq = z - a;
        return scale * exp_fast(lq) * (lq - (y - b) - mean);
      });
    } else {
      const float share = scale * (1.0f - beta);
      rewrite(s, t, columns,
              [=](float z, float y) { return share * exp_fast(z - a) * (y - mean); });
    }
    std::fill(s + columns, s + stride, 0.0f);
  });
}

void picked_logits(const float* hidden, const float* weight, const int64_t* picked, int64_t rows,
                   int64_t picks, int64_t width, float* logits) {
  for_rows(rows, [=](int64_t row) {
    const float* h = hidden + row * width;
    for (int64_t at = row * picks; at < (row + 1) * picks; ++at) {
      float dot = 0.0f;
      if (picked[at] >= 0) {
        const float* w = weight + picked[at] * width;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < width; ++i) {
          dot += h[i] * w[i];
        }
      }
      logits[at] = dot;
    }
  });
}

void picked_d_hidden(const float* dz, const float* weight, const int64_t* picked, int64_t rows,
                     int64_t picks, int64_t width, float* d_hidden) {
  for_rows(rows, [=](int64_t row) {
    float* out = d_hidden + row * width;
    std::fill(out, out + width, 0.0f);
    for (int64_t at = row * picks; at < (row + 1) * picks; ++at) {
      if (picked[at] >= 0) {
        add_scaled(dz[at], weight + picked[at] * width, width, out);
      }
    }
  });
}

void picked_d_weight(const float* dz, const float* hidden, const int64_t* picked, int64_t rows,
                     int64_t picks, int64_t width, float* d_weight) {
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    for (int64_t at = 0; at < rows * picks; ++at) {
      if (picked[at] >= 0 && picked[at] % threads == thread) {
        add_scaled(dz[at], hidden + at / picks * width, width, d_weight + picked[at] * width);
      }
    }
  }
}

}  // namespace q3mega
