// Row kernels of the divergences between two blocks of logits, and products with a few rows of an
// lm_head a token; docs/operators.md has the maths.
#pragma once

#include <cstdint>

namespace q3mega {

// Numbered as DIVERGENCES of kernels/triton/__init__.py.
enum Divergence : int64_t { kForward = 0, kReverse = 1, kJsd = 2 };

// student, teacher (rows, stride) logits with their log-sum-exps (rows). sums (rows, 2), over the
// `columns` that are real: forward sum p ln(p/q), reverse sum q ln(q/p), both in sums[0]; jsd with
// m = beta p + (1 - beta) q: sum p ln(p/m) and sum q ln(q/m). q is the student's distribution. jsd
// leaves ln(q/m) in `teacher`, where its gradient takes it from.
void divergence_sums(const float* student, float* teacher, int64_t rows, int64_t stride,
                     int64_t columns, const float* lse_student, const float* lse_teacher,
                     Divergence kind, float beta, float* sums);

// In place: student logits -> g times the divergence's gradient, 0 past `columns`, after
// divergence_sums of the same blocks. student_part (rows): the sum over q of
// divergence_sums over the whole vocabulary (unused by forward). g (rows).
void divergence_gradient(float* student, const float* teacher, int64_t rows, int64_t stride,
                         int64_t columns, const float* lse_student, const float* lse_teacher,
                         Divergence kind, float beta, const float* student_part, const float* g);

// Products with a few rows of an lm_head (vocabulary, width). picked (rows, picks): those rows'
// indices, `picks` of them a token; -1 is a row of another rank.

// logits (rows, picks) of hidden (rows, width).
void picked_logits(const float* hidden, const float* weight, const int64_t* picked, int64_t rows,
                   int64_t picks, int64_t width, float* logits);

// d_hidden (rows, width) from the logits' gradients dz (rows, picks).
void picked_d_hidden(const float* dz, const float* weight, const int64_t* picked, int64_t rows,
                     int64_t picks, int64_t width, float* d_hidden);

// Adds to d_weight (vocabulary, width). Each of its rows belongs to one thread, so sums do not
// depend on the number of threads. Threads take rows in turn, since the ids that teachers prefer
// lie close together.
void picked_d_weight(const float* dz, const float* hidden, const int64_t* picked, int64_t rows,
                     int64_t picks, int64_t width, float* d_weight);

}  // namespace q3mega
