// Dual-chunk attention in tiles; docs/operators.md has the maths.
#pragma once

#include <cstdint>

namespace q3mega {

// Packed sequences, fp32. Queries of sequence b are rows cu_q[b] .. cu_q[b+1], its keys rows
// cu_k[b] .. cu_k[b+1]; the queries are the sequence's tokens from `q_offset` on.
struct DualChunk {
  int64_t sequences, heads, kv_heads, dim;
  const int64_t *cu_q, *cu_k;
  int64_t q_offset, chunk, clamp;
  const float *cosine, *sine;  // (positions, dim / 2): every position that a rotation uses
  float scale;
};

// out (Tq, heads, dim), lse (Tq, heads) from q (Tq, heads, dim), k and v (Tk, kv_heads, dim).
void dual_chunk_forward(const DualChunk& shape, const float* q, const float* k, const float* v,
                        float* out, float* lse);

// Gradients of the above; d_k and d_v come zeroed. Exact: the log-sum-exp is that of the whole row.
void dual_chunk_backward(const DualChunk& shape, const float* q, const float* k, const float* v,
                         const float* out, const float* lse, const float* d_out, float* d_q,
                         float* d_k, float* d_v);

}  // namespace q3mega
