// Dual-chunk attention for Hopper: one pass over the keys, forward and a deterministic backward.
//
// The method is that of kernels/dual_chunk_attention.py. A query tile lies in one chunk and is
// rotated anew, in fp32, when its chunk distance to the keys changes; running maximum, mass and
// output go through all phases. The rotated query carries softmax scale and log2(e), so that a
// product is a power of two's exponent.
//
// A block is three warpgroups: one loads, two multiply 64 rows each. Keys and values come by TMA:
// one thread keeps the copies in flight without registers of the others, the swizzle costs nothing,
// and rows past the end are zero. Never run on a GPU: compiled for sm_90a and emulated (tests/ops).
#include <type_traits>

#include "kernels.h"
#include "sm90.h"

namespace q3mega::cuda {
namespace {

using namespace sm90;

constexpr int kRows = 64;        // of a warpgroup's product, and of a TMA box
constexpr int kColumns = 64;     // of a panel: 128 bytes, the swizzle's span
constexpr int kWarpgroup = 128;  // threads
constexpr int kBlock = 3 * kWarpgroup;
constexpr int kOctet = 8 * 128;  // bytes of 8 rows of a panel
constexpr int kStages = 2;       // of the ring of streamed tiles
constexpr float kLog2e = 1.4426950408889634f;

// A tile (R, D) of 16-bit numbers: D / 64 panels of R rows, each row of a panel 128 swizzled bytes.
template <int R, int D>
struct alignas(1024) Tile {
  static constexpr int kPanel = R * 128;  // bytes
  uint16_t x[R * D];
};

struct Problem {
  int heads, kv_heads, chunk, clamp;
  float scale;
  const float *cosine, *sine;
  const int* work;
};

// ---- products: accumulators are (64, N), k-steps are 16 wide

// s = a b', over D columns.
template <class T, int N, int D>
__device__ void multiply_transposed(float (&s)[N / 2], const Tile<kRows, D>& a,
                                    const Tile<N, D>& b) {
  const uint32_t left = shared_address(&a), right = shared_address(&b);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const int panel = k / 4, inside = k % 4 * 32;
    wgmma<T, N>(s, descriptor(left + panel * Tile<kRows, D>::kPanel + inside, kOctet, 16),
                descriptor(right + panel * Tile<N, D>::kPanel + inside, kOctet, 16), k > 0);
  }
  wgmma_commit();
}

// o += p b: p (64, R) in registers, b's rows are summed over.
template <class T, int R, int D>
__device__ void multiply_add(float (&o)[D / 2], const uint32_t (&p)[R / 16][4],
                             const Tile<R, D>& b) {
  const uint32_t right = shared_address(&b);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < R / 16; ++k) {
    wgmma<T, D>(o, p[k], descriptor(right + k * 2 * kOctet, kOctet, Tile<R, D>::kPanel));
  }
  wgmma_commit();
}

// An accumulator (64, N) as the left operand of the next product: the fragments agree.
template <class T, int N>
__device__ void pack_operand(uint32_t (&p)[N / 16][4], const float (&s)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    p[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
  }
}

// This thread's share of an accumulator (64, N): rows `row()` and 8 below, of every 8 columns two.
struct Lane {
  int thread;  // of the warpgroup
  __device__ int row() const { return thread / 32 * 16 + thread % 32 / 4; }
  __device__ int column() const { return thread % 4 * 2; }
  // body(number, 0 or 1: which of the rows, column)
  template <int N, class Body>
  __device__ void each(float (&x)[N], const Body& body) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      body(x[i], i / 2 % 2, i / 4 * 8 + column() + i % 2);
    }
  }
};

// ---- rotations

// The rotation of a query at `place` of its chunk for keys `distance` chunks before.
__device__ int position(const Problem& problem, int place, int distance) {
  if (distance == 0) {
    return place;
  }
  return min(problem.chunk + (distance == 1 ? place : problem.chunk - 1), problem.clamp);
}

// 64 rows of one head, `step` numbers apart, rotated in fp32 and scaled to a tile of operands, by a
// warpgroup. Rows past `rows` repeat the last.
template <class T, int D>
__device__ void rotate(const Problem& problem, const T* x, int64_t step, int rows, int place,
                       int distance, int thread, Tile<kRows, D>& tile) {
  constexpr int kVectors = D / 16;  // of 8 numbers, in a half row
  const float factor = problem.scale * kLog2e;
  for (int item = thread; item < kRows * kVectors; item += kWarpgroup) {
    const int row = item / kVectors, d = item % kVectors * 8, from = min(row, rows - 1);
    const int64_t angle =
        static_cast<int64_t>(position(problem, place + from, distance)) * (D / 2) + d;
    uint4 a = *reinterpret_cast<const uint4*>(x + from * step + d);
    uint4 b = *reinterpret_cast<const uint4*>(x + from * step + d + D / 2);
    uint32_t* first = &a.x;
    uint32_t* second = &b.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 c = *reinterpret_cast<const float2*>(problem.cosine + angle + 2 * i);
      const float2 s = *reinterpret_cast<const float2*>(problem.sine + angle + 2 * i);
      const float2 u = unpack<T>(first[i]), v = unpack<T>(second[i]);
      first[i] = pack<T>((u.x * c.x - v.x * s.x) * factor, (u.y * c.y - v.y * s.y) * factor);
      second[i] = pack<T>((v.x * c.x + u.x * s.x) * factor, (v.y * c.y + u.y * s.y) * factor);
    }
    const auto at = [&](int column) {
      return reinterpret_cast<char*>(tile.x) + column / kColumns * Tile<kRows, D>::kPanel +
             row * 128 + (column % kColumns * 2 ^ row % 8 * 16);
    };
    store_operand(at(d), a);
    store_operand(at(d + D / 2), b);
  }
  fence_async();
}

// ---- walks

// A row of `work`: queries of one sequence and chunk.
struct QueryTile {
  int row, rows, token, keys;
  __device__ QueryTile(const int* work, int tile)
      : row(work[4 * tile]),
        rows(work[4 * tile + 1]),
        token(work[4 * tile + 2]),
        keys(work[4 * tile + 3]) {}
};

// Over the key tiles that queries [token, end) of one chunk see: those two chunks before and more,
// one chunk before, their own.
struct KeyWalk {
  int own, before, end;
  int distance = 3, start = 0, high = 0;  // this tile: keys [start, start + step) below high

  __device__ KeyWalk(int chunk, int token, int last)
      : own(token / chunk * chunk), before(max(own - chunk, 0)), end(last) {}

  __device__ bool next(int step) {
    start += step;
    while (start >= high) {
      if (--distance < 0) {
        return false;
      }
      start = distance == 2 ? 0 : distance == 1 ? before : own;
      high = distance == 2 ? before : distance == 1 ? own : end;
    }
    return true;
  }
};

// A place in the ring of stages. A stage is full in phase `parity`, empty in the one before.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// By one thread.
template <int R, int D>
__device__ void load(Tile<R, D>& tile, const TensorMap& map, Barrier& full, int head, int row) {
#pragma unroll
  for (int i = 0; i < R / kRows * (D / kColumns); ++i) {
    const int panel = i / (R / kRows), rows = i % (R / kRows) * kRows;
    copy_box(tile.x + (panel * R + rows) * kColumns, map, full, panel * kColumns, head, row + rows);
  }
}

__device__ void release(Barrier& empty, int thread) {
  sync_warp();
  if (thread % 32 == 0) {
    arrive(empty);
  }
}

// ---- forward

constexpr int kForwardKeys = 128;

template <int D>
struct ForwardShared {
  Tile<kRows, D> query[2];
  Tile<kForwardKeys, D> key[kStages], value[kStages];
  Barrier key_full[kStages], value_full[kStages], key_empty[kStages], value_empty[kStages];
};

// Softmax of two rows of logits to base 2, tile by tile. Quads of threads share rows.
struct OnlineSoftmax {
  float top[2] = {-INFINITY, -INFINITY}, mass[2] = {0.0f, 0.0f};  // mass: this thread's share

  // s becomes 2^(s - top); fade is what earlier sums must be multiplied by.
  template <int N>
  __device__ void update(float (&s)[N], float (&fade)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float best = top[h];
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        best = fmaxf(best, fmaxf(s[i + 2 * h], s[i + 2 * h + 1]));
      }
      best = fmaxf(best, shuffle_xor(best, 1));
      best = fmaxf(best, shuffle_xor(best, 2));
      fade[h] = exp2_fast(top[h] - best);
      top[h] = best;
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        s[i + 2 * h] = exp2_fast(s[i + 2 * h] - best);
        s[i + 2 * h + 1] = exp2_fast(s[i + 2 * h + 1] - best);
        total += s[i + 2 * h] + s[i + 2 * h + 1];
      }
      mass[h] = mass[h] * fade[h] + total;
    }
  }
};

// -inf where the key lies past the phase's end or in the future of the lane's rows' tokens.
template <int N>
__device__ void mask(float (&s)[N], const Lane& lane, const KeyWalk& walk, int token) {
  const int seen = walk.high - walk.start, now = token + lane.row() - walk.start;
  lane.each(s, [&](float& x, int h, int column) {
    x = column < seen && column <= now + 8 * h ? x : -INFINITY;
  });
}

template <class T, int D>
__global__ void __launch_bounds__(kBlock, 1)
    forward_kernel(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                   const Problem problem, const T* __restrict__ q, T* __restrict__ out,
                   float* __restrict__ lse) {
  constexpr int N = kForwardKeys;
  auto& shared = dynamic_shared<ForwardShared<D>>();
  const int head = blockIdx.x % problem.heads, kv = head / (problem.heads / problem.kv_heads);
  const QueryTile tile(problem.work, blockIdx.x / problem.heads);
  const int consumers = tile.rows > kRows ? 2 : 1;
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init(shared.key_full[i], 1);
      init(shared.value_full[i], 1);
      init(shared.key_empty[i], 4 * consumers);  // warps
      init(shared.value_empty[i], 4 * consumers);
    }
    fence_init();
  }
  sync_block();

  if (warpgroup == 2) {
    shrink_registers<24>();
    if (thread == 0) {
      KeyWalk walk(problem.chunk, tile.token, tile.token + tile.rows);
      for (Ring ring; walk.next(N); ring.next()) {
        const int i = ring.stage, row = tile.keys + walk.start;
        wait(shared.key_empty[i], ring.parity ^ 1);
        arrive_expecting(shared.key_full[i], sizeof(shared.key[i]));
        load(shared.key[i], k_map, shared.key_full[i], kv, row);
        wait(shared.value_empty[i], ring.parity ^ 1);
        arrive_expecting(shared.value_full[i], sizeof(shared.value[i]));
        load(shared.value[i], v_map, shared.value_full[i], kv, row);
      }
    }
  } else if (warpgroup < consumers) {
    grow_registers<240>();
    const Lane lane{thread};
    const int first = warpgroup * kRows, token = tile.token + first;
    const int rows = min(tile.rows - first, kRows);
    const int64_t step = static_cast<int64_t>(problem.heads) * D;
    const int64_t at = (tile.row + first) * step + head * D;
    auto& query = shared.query[warpgroup];
    KeyWalk walk(problem.chunk, tile.token, token + rows);
    OnlineSoftmax softmax;
    float s[N / 2], o[D / 2], fade[2];
    uint32_t p[N / 16][4];
    int turned = -1;

    const auto turn = [&] {  // the query, if the distance is a new one
      if (walk.distance != turned) {
        turned = walk.distance;
        rotate(problem, q + at, step, rows, token - walk.own, turned, thread, query);
        sync_threads(1 + warpgroup, kWarpgroup);
      }
    };
    const auto mask_edge = [&] {
      if (walk.start + N > min(walk.high, token + 1)) {
        mask(s, lane, walk, token);
      }
    };
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      o[i] = 0.0f;
    }
    Ring keys, values;
    walk.next(N);
    turn();
    wait(shared.key_full[keys.stage], keys.parity);
    multiply_transposed<T, N, D>(s, query, shared.key[keys.stage]);
    wgmma_wait<0>(s);
    release(shared.key_empty[keys.stage], thread);
    mask_edge();
    softmax.update(s, fade);
    pack_operand<T, N>(p, s);
    while (walk.next(N)) {  // the next logits under way while this tile's values are summed
      keys.next();
      turn();
      wait(shared.key_full[keys.stage], keys.parity);
      multiply_transposed<T, N, D>(s, query, shared.key[keys.stage]);
      wait(shared.value_full[values.stage], values.parity);
      multiply_add<T, N, D>(o, p, shared.value[values.stage]);
      wgmma_wait<1>(s);
      release(shared.key_empty[keys.stage], thread);
      mask_edge();
      softmax.update(s, fade);
      wgmma_wait<0>(o);
      release(shared.value_empty[values.stage], thread);
      values.next();
      lane.each(o, [&](float& x, int h, int) { x *= fade[h]; });
      pack_operand<T, N>(p, s);
    }
    wait(shared.value_full[values.stage], values.parity);
    multiply_add<T, N, D>(o, p, shared.value[values.stage]);
    wgmma_wait<0>(o);

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float mass = softmax.mass[h];
      mass += shuffle_xor(mass, 1);
      mass += shuffle_xor(mass, 2);
      const int row = lane.row() + 8 * h;
      if (row < rows) {
        T* to = out + at + row * step;
#pragma unroll
        for (int i = 2 * h; i < D / 2; i += 4) {
          *reinterpret_cast<uint32_t*>(to + i / 4 * 8 + lane.column()) =
              pack<T>(o[i] / mass, o[i + 1] / mass);
        }
        if (lane.column() == 0) {
          lse[static_cast<int64_t>(tile.row + first + row) * problem.heads + head] =
              (softmax.top[h] + log2f(mass)) / kLog2e;
        }
      }
    }
  }
}

// launch(element, head dimension) for the types that the kernels are made for.
template <class Launch>
cudaError_t for_types(int type, int dim, const Launch& launch) {
  const std::integral_constant<int, 64> narrow;
  const std::integral_constant<int, 128> wide;
  if ((type != 0 && type != 1) || (dim != narrow && dim != wide)) {
    return cudaErrorInvalidValue;
  }
  if (type == 0) {
    return dim == narrow ? launch(Bf16{}, narrow) : launch(Bf16{}, wide);
  }
  return dim == narrow ? launch(Fp16{}, narrow) : launch(Fp16{}, wide);
}

}  // namespace

cudaError_t attention_forward(int type, int dim, int heads, int kv_heads, int chunk, int clamp,
                              float scale, const float* cosine, const float* sine, int64_t keys,
                              const int* work, int64_t tiles, const void* q, const void* k,
                              const void* v, void* out, float* lse, cudaStream_t stream) {
  return for_types(type, dim, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int D = width;
    TensorMap k_map, v_map;
    cudaError_t error = tensor_map<T>(&k_map, k, D, kv_heads, keys);
    error = error == cudaSuccess ? tensor_map<T>(&v_map, v, D, kv_heads, keys) : error;
    if (error != cudaSuccess) {
      return error;
    }
    const Problem problem{heads, kv_heads, chunk, clamp, scale, cosine, sine, work};
    return launch(forward_kernel<T, D>, tiles * heads, kBlock, sizeof(ForwardShared<D>), stream,
                  k_map, v_map, problem, static_cast<const T*>(q), static_cast<T*>(out), lse);
  });
}

}  // namespace q3mega::cuda
