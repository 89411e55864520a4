// What the row kernels share. A block has one row: memory-bound passes, 16 bytes a load wherever
// the row's address allows (a vocabulary need not be a multiple of four), sums in one order.
#pragma once

#include "sm90.h"

namespace q3mega::cuda {

using sm90::dynamic_shared;
using sm90::shuffle_xor;
using sm90::sync_block;

constexpr int kRowThreads = 512, kRowBlocks = 4;  // that fill a multiprocessor

__device__ inline void load(float (&to)[4], const float* x) {
  const float4 all = *reinterpret_cast<const float4*>(x);
  to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
}

__device__ inline void load(float (&to)[1], const float* x) { to[0] = *x; }

__device__ inline void store(float* x, const float (&from)[4]) {
  *reinterpret_cast<float4*>(x) = {from[0], from[1], from[2], from[3]};
}

__device__ inline void store(float* x, const float (&from)[1]) { *x = from[0]; }

// body(column, numbers) for all columns of two rows, by the block: `numbers` is float[4], yet
// unfilled, where both addresses are multiples of 16 bytes, else float[1].
template <class Body>
__device__ void for_columns(const float* x, const float* y, int64_t columns, const Body& body) {
  const auto past = [](const float* at) { return reinterpret_cast<uintptr_t>(at) % 16 / 4; };
  const int64_t before = past(x) == past(y) ? (4 - past(x)) % 4 : columns;
  const int64_t head = before < columns ? before : columns, fours = (columns - head) / 4;
  float four[4], one[1];
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < fours; i += kRowThreads) {
    body(head + 4 * i, four);
  }
  for (int64_t i = threadIdx.x; i < head; i += kRowThreads) {
    body(i, one);
  }
  for (int64_t i = head + 4 * fours + threadIdx.x; i < columns; i += kRowThreads) {
    body(i, one);
  }
}

// N numbers of every thread, merged by `merge(into, from)` to those of the first thread.
template <int N, class Merge>
__device__ void reduce(float (&x)[N], const Merge& merge) {
  auto& warps = dynamic_shared<float[kRowThreads / 32][N]>();
  const auto across = [&](int width) {
    for (int lanes = 1; lanes < width; lanes *= 2) {
      float other[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        other[i] = shuffle_xor(x[i], lanes);
      }
      merge(x, other);
    }
  };
  across(32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < N && lane == 0; ++i) {
    warps[warp][i] = x[i];
  }
  sync_block();
  for (int i = 0; i < N && lane < kRowThreads / 32; ++i) {
    x[i] = warps[lane][i];
  }
  across(kRowThreads / 32);
}

template <int N>
constexpr int kReduceBytes = kRowThreads / 32 * N * sizeof(float);

}  // namespace q3mega::cuda
