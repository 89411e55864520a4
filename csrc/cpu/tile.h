// A small matrix product for tiles that stay in the cache: what attention is made of.
#pragma once

#include <cstdint>
#include <cstring>

namespace q3mega {

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));

// C (M, 16) += A (M, k) B (k, 16); A has any strides, B and C contiguous rows.
template <int M>
inline void micro(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                  float* c, int64_t c_row, int64_t k) {
  v8 sum[M][2];
  for (int i = 0; i < M; ++i) {
    sum[i][0] = *reinterpret_cast<const v8*>(c + i * c_row);
    sum[i][1] = *reinterpret_cast<const v8*>(c + i * c_row + 8);
  }
  for (int64_t p = 0; p < k; ++p) {
    const v8 left = *reinterpret_cast<const v8*>(b + p * b_row);
    const v8 right = *reinterpret_cast<const v8*>(b + p * b_row + 8);
    for (int i = 0; i < M; ++i) {
      const float x = a[i * a_row + p * a_column];
      sum[i][0] += x * left;
      sum[i][1] += x * right;
    }
  }
  for (int i = 0; i < M; ++i) {
    *reinterpret_cast<v8*>(c + i * c_row) = sum[i][0];
    *reinterpret_cast<v8*>(c + i * c_row + 8) = sum[i][1];
  }
}

// C (m, n) += A (m, k) B (k, n). n is a multiple of 16: tiles are padded.
inline void add_product(const float* a, int64_t a_row, int64_t a_column, const float* b,
                        int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k) {
  for (int64_t j = 0; j < n; j += 16) {
    int64_t i = 0;
    for (; i + 6 <= m; i += 6) {
      micro<6>(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, k);
    }
    for (; i + 2 <= m; i += 2) {
      micro<2>(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, k);
    }
    for (; i < m; ++i) {
      micro<1>(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, k);
    }
  }
}

}  // namespace q3mega
