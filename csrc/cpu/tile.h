// A small matrix product for tiles that stay in the cache: what attention is made of.
#pragma once

#include <cstdint>
#include <new>
#include <vector>

#include "rows.h"

namespace q3mega {

// Memory that begins with a cache line: a vector of AVX-512 that straddles two costs two loads.
template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  friend bool operator==(const Aligned&, const Aligned&) { return true; }
  friend bool operator!=(const Aligned&, const Aligned&) { return false; }
};
typedef std::vector<float, Aligned<float>> Floats;

// The sums of a micro-kernel fill the registers: kRows rows of two vectors, beside two of B.
constexpr int64_t kRows = kVector == 16 ? 12 : 6, kFewRows = kRows / 3;
constexpr int64_t kLanes = 2 * kVector;  // tiles are padded to columns of so many

// C (M, kLanes) = A (M, k) B (k, kLanes), or += with kAdd; A has any strides, B and C contiguous
// rows.
template <int M, bool kAdd>
inline void micro(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                  float* c, int64_t c_row, int64_t k) {
  Vector sum[M][2] = {};
  if (kAdd) {
    for (int i = 0; i < M; ++i) {
      sum[i][0] = *reinterpret_cast<const Vector*>(c + i * c_row);
      sum[i][1] = *reinterpret_cast<const Vector*>(c + i * c_row + kVector);
    }
  }
  for (int64_t p = 0; p < k; ++p) {
    const Vector left = *reinterpret_cast<const Vector*>(b + p * b_row);
    const Vector right = *reinterpret_cast<const Vector*>(b + p * b_row + kVector);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const float x = a[i * a_row + p * a_column];
      sum[i][0] += x * left;
      sum[i][1] += x * right;
    }
  }
  for (int i = 0; i < M; ++i) {
    *reinterpret_cast<Vector*>(c + i * c_row) = sum[i][0];
    *reinterpret_cast<Vector*>(c + i * c_row + kVector) = sum[i][1];
  }
}

// C (m, n) = A (m, k) B (k, n), or += with kAdd. n is a multiple of kLanes: tiles are padded.
template <bool kAdd>
inline void product(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                    float* c, int64_t c_row, int64_t m, int64_t n, int64_t k) {
  for (int64_t j = 0; j < n; j += kLanes) {
    int64_t i = 0;
    for (; i + kRows <= m; i += kRows) {
      micro<kRows, kAdd>(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, k);
    }
    for (; i + kFewRows <= m; i += kFewRows) {
      micro<kFewRows, kAdd>(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row,
                            k);
    }
    for (; i < m; ++i) {
      micro<1, kAdd>(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, k);
    }
  }
}

}  // namespace q3mega
