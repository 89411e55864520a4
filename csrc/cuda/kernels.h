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
extern "C" {

// Packed sequences, operands of `type` (0 bf16, 1 fp16): q, out, d_out (Tq, heads, dim), k and v
// (keys, kv_heads, dim), k rotated and q not; dim is 64 or 128. lse and delta (Tq, heads) fp32: the
// log-sum-exp of the logits and the sum of out times d_out. cosine and sine (positions, dim / 2)
// fp32 of every position that a rotation uses.
//
// work (tiles, 4) int32, of at most 128 rows: first row of q, rows, first token (all of one chunk),
// first row of the sequence in k.
cudaError_t attention_forward(int type, int dim, int heads, int kv_heads, int chunk, int clamp,
                              float scale, const float* cosine, const float* sine, int64_t keys,
                              const int* work, int64_t tiles, const void* q, const void* k,
                              const void* v, void* out, float* lse, cudaStream_t stream);

}  // extern "C"
}  // namespace q3mega::cuda
