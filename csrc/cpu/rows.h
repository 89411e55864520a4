// What the row kernels share: exp and log that vectorise, and a loop over rows on torch's threads.
//
// The kernels know raw pointers only, no torch headers: they build in seconds and load into any
// torch. OpenMP is the runtime that torch brings along, so its thread count is
// torch.get_num_threads().
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace q3mega {

// What the registers of this build hold.
#ifdef __AVX512F__
constexpr int64_t kVector = 16;
#else
constexpr int64_t kVector = 8;
#endif
typedef float Vector __attribute__((vector_size(kVector * 4), aligned(4), may_alias));

constexpr int64_t kLineFloats = 16;

constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723212e-6f;
constexpr int64_t kBlock = 256;  // floats that are summed in fp32 before a double takes the sum

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// e^x within 2 ulp: 2^n e^r with |r| <= ln 2 / 2, and e^r = 1 + r (...), the polynomial of least
// relative error (2e-9). e^88 beyond 88, 0 below -87, where normal floats end.
inline float exp_fast(float x) {
  x = x > 88.0f ? 88.0f : x;
  const float magic = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  const float r = x - n * kLn2High - n * kLn2Low;
  float p = 1.3843606704e-3f;
  p = p * r + 8.3741956134e-3f;
  p = p * r + 4.1668004725e-2f;
  p = p * r + 1.6666430800e-1f;
  p = p * r + 4.9999994192e-1f;
  p = p * r + 1.0000000323f;
  p = p * r + 1.0f;
  // The low bits of `shifted` are n + 127: the exponent of 2^n.
  return x < -87.0f ? 0.0f : p * bits_to_float(float_to_bits(shifted) << 23);
}

// ln x for normal x > 0, within 2 ulp: x = 2^n (1 + m) with 1 + m in [sqrt(1/2), sqrt(2)), and
// ln(1 + m) = m + m^2 (...), the polynomial of least relative error (3e-8). Of 0 about -88.
inline float log_fast(float x) {
  const uint32_t bits = float_to_bits(x), offset = bits - 0x3f3504f3;  // the bits of sqrt(1/2)
  const int32_t n = static_cast<int32_t>(offset) >> 23;
  const float m = bits_to_float(bits - (offset & 0xff800000)) - 1.0f, e = static_cast<float>(n);
  float p = 8.7348449033e-2f;
  p = p * m - 1.4307522553e-1f;
  p = p * m + 1.4917973316e-1f;
  p = p * m - 1.6570508042e-1f;
  p = p * m + 1.9962072149e-1f;
  p = p * m - 2.5001755259e-1f;
  p = p * m + 3.3333950221e-1f;
  p = p * m - 4.9999991606e-1f;
  return m * m * p + e * kLn2Low + m + e * kLn2High + (x - x);  // NaN stays NaN
}

// max(top, max z). By hand: compilers leave this loop alone, for the sake of NaN, which is ignored.
inline float maximum(const float* z, int64_t n, float top) {
  Vector best[4];
  for (Vector& lanes : best) {
    lanes = Vector{} + top;
  }
  int64_t v = 0;
  for (; v + 4 * kVector <= n; v += 4 * kVector) {
    for (int i = 0; i < 4; ++i) {
      const Vector next = *reinterpret_cast<const Vector*>(z + v + i * kVector);
      best[i] = next > best[i] ? next : best[i];
    }
  }
  const Vector low = best[0] > best[1] ? best[0] : best[1];
  const Vector high = best[2] > best[3] ? best[2] : best[3];
  Vector lanes = low > high ? low : high;
  for (int64_t half = kVector / 2; half > 0; half /= 2) {  // a tree: lane by lane would take longer
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] = lanes[lane] > lanes[lane + half] ? lanes[lane] : lanes[lane + half];
    }
  }
  top = lanes[0];
  for (; v < n; ++v) {
    top = std::max(top, z[v]);
  }
  return top;
}

// Asks memory for the block of some rows after the one that follows `start`'s: with so much to
// compute the processor does not look that far ahead by itself.
template <class... Rows>
inline void fetch_ahead(int64_t start, const Rows*... rows) {
  for (int64_t v = start + 2 * kBlock; v < start + 3 * kBlock; v += kLineFloats) {
    (__builtin_prefetch(rows + v), ...);
  }
}

// body(row) for every row, shared by torch's threads.
template <class Body>
void for_rows(int64_t rows, const Body& body) {
#pragma omp parallel for schedule(static) if (rows > 1)
  for (int64_t row = 0; row < rows; ++row) {
    body(row);
  }
}

}  // namespace q3mega
