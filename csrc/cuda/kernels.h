// The launchers of the CUDA kernels: raw addresses on the current device, nothing of torch. Each
// enqueues on `stream` and returns the launch's error.
#pragma once

#include <cstdint>
#ifdef Q3MEGA_EMULATE
#include "sm90.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace q3mega::cuda {

// Packed sequences: q, out, d_out, d_q (queries, heads, dim), k, v, d_k, d_v (keys, kv_heads, dim),
// k rotated and q not.
struct Attention {
  int type, dim;  // 0 bf16, 1 fp16; 64 or 128
  int heads, kv_heads;
  int64_t queries, keys;  // rows
  int chunk, clamp;
  float scale;
  const float *cosine, *sine;  // (positions, dim / 2) of every position that a rotation uses
  const int* tile_list;        // (tiles, 4 or 6), from kernels/triton/tiles.py: at most 128 rows
  int64_t tiles;
};

// Numbered as DIVERGENCES of kernels/triton/__init__.py.
enum Divergence : int { kForward = 0, kReverse = 1, kJsd = 2 };

extern "C" {

// The row kernels: semantics and shapes of csrc/cpu/linear_logprob.h and csrc/cpu/distill_loss.h.
cudaError_t row_stats(const float* logits, int64_t rows, int64_t stride, int64_t columns,
                      const int64_t* column, float* stats, cudaStream_t stream);
cudaError_t row_gradient(float* logits, int64_t rows, int64_t stride, int64_t columns,
                         const int64_t* column, const float* lse, const float* entropy,
                         const float* g_logprob, const float* g_entropy, cudaStream_t stream);
cudaError_t divergence_sums(const float* student, const float* teacher, int64_t rows,
                            int64_t stride, int64_t columns, const float* lse_student,
                            const float* lse_teacher, Divergence kind, float beta, float* sums,
                            cudaStream_t stream);
cudaError_t divergence_gradient(float* student, const float* teacher, int64_t rows, int64_t stride,
                                int64_t columns, const float* lse_student, const float* lse_teacher,
                                Divergence kind, float beta, const float* student_part,
                                const float* g, cudaStream_t stream);

// lse (queries, heads) fp32: the log-sum-exp of the logits. tile_list: query_tiles.
cudaError_t attention_forward(Attention problem, const void* q, const void* k, const void* v,
                              void* out, float* lse, cudaStream_t stream);

// delta (queries, heads) fp32: the sum of out times d_out. tile_list: query_tiles.
cudaError_t attention_query_gradient(Attention problem, const void* d_out, const void* q,
                                     const void* k, const void* v, const float* lse,
                                     const float* delta, void* d_q, cudaStream_t stream);

// d_k is fp32, of the rotated key. tile_list: key_tiles.
cudaError_t attention_key_gradient(Attention problem, const void* d_out, const void* q,
                                   const void* k, const void* v, const float* lse,
                                   const float* delta, float* d_k, void* d_v, cudaStream_t stream);

}  // extern "C"
}  // namespace q3mega::cuda
