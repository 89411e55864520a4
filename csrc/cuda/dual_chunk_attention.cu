// Dual-chunk attention for Hopper: one pass over the keys, forward and a deterministic backward.
//
// The method is that of kernels/triton/dual_chunk_attention.py. A query tile lies in one chunk and
// is rotated anew, in fp32, when its chunk distance to the keys changes; running maximum, mass and
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
constexpr int kKeys = 128;       // of a tile that streams past queries
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

// The rotation of a query at `index` of its chunk for keys `distance` chunks before.
__device__ int position(const Attention& problem, int index, int distance) {
  if (distance == 0) {
    return index;
  }
  return min(problem.chunk + (distance == 1 ? index : problem.chunk - 1), problem.clamp);
}

// 64 rows of one head, `step` numbers apart, rotated in fp32 and scaled to a tile of operands, by a
// warpgroup. Rows past `rows` repeat the last.
template <class T, int D>
__device__ void rotate(const Attention& problem, const T* x, int64_t step, int rows, int index,
                       int distance, int thread, Tile<kRows, D>& tile) {
  constexpr int kVectors = D / 16;  // of 8 numbers, in a half row
  const float factor = problem.scale * kLog2e;
  for (int item = thread; item < kRows * kVectors; item += kWarpgroup) {
    const int row = item / kVectors, d = item % kVectors * 8, from = min(row, rows - 1);
    const int64_t angle =
        static_cast<int64_t>(position(problem, index + from, distance)) * (D / 2) + d;
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

// The accumulators of a warpgroup's rows, rotated by their positions, or back with sign -1.
template <int N>
__device__ void turn(const Attention& problem, float (&x)[N], const Lane& lane, int rows, int index,
                     int distance, float sign) {
  constexpr int D = 2 * N;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int from = min(lane.row() + 8 * h, rows - 1);
    const int64_t angle =
        static_cast<int64_t>(position(problem, index + from, distance)) * (D / 2) + lane.column();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const float2 c = *reinterpret_cast<const float2*>(problem.cosine + angle + 8 * i);
      const float2 s = *reinterpret_cast<const float2*>(problem.sine + angle + 8 * i);
      const auto pair = [&](float& a, float& b, float cosine, float sine) {
        const float first = a * cosine - b * sine;
        b = b * cosine + a * sine;
        a = first;
      };
      pair(x[4 * i + 2 * h], x[4 * i + 2 * h + N / 2], c.x, sign * s.x);
      pair(x[4 * i + 2 * h + 1], x[4 * i + 2 * h + 1 + N / 2], c.y, sign * s.y);
    }
  }
}

// ---- walks

// A row of `tile_list`: queries of one sequence and chunk.
struct QueryTile {
  int row, rows, token, keys;
  __device__ QueryTile(const int* tile_list, int tile)
      : row(tile_list[4 * tile]),
        rows(tile_list[4 * tile + 1]),
        token(tile_list[4 * tile + 2]),
        keys(tile_list[4 * tile + 3]) {}
};

// Over the key tiles that queries [token, end) of one chunk see: those two chunks before and more,
// one chunk before, their own.
struct KeyWalk {
  int chunk_start, before, end;
  int distance = 3, start = 0, high = 0;  // this tile: keys [start, start + step) below high

  __device__ KeyWalk(int chunk, int token, int last)
      : chunk_start(token / chunk * chunk), before(max(chunk_start - chunk, 0)), end(last) {}

  __device__ bool next(int step) {
    start += step;
    while (start >= high) {
      if (--distance < 0) {
        return false;
      }
      start = distance == 2 ? 0 : distance == 1 ? before : chunk_start;
      high = distance == 2 ? before : distance == 1 ? chunk_start : end;
    }
    return true;
  }
};

// A row of `key_work`: keys of one sequence and chunk, and the queries of that sequence.
struct KeyTile {
  int row, rows, token, queries, first, last;  // the queries are tokens [first, last)
  __device__ KeyTile(const int* tile_list, int tile)
      : row(tile_list[6 * tile]),
        rows(tile_list[6 * tile + 1]),
        token(tile_list[6 * tile + 2]),
        queries(tile_list[6 * tile + 3]),
        first(tile_list[6 * tile + 4]),
        last(first + tile_list[6 * tile + 5]) {}
};

// Over the query tiles that see a tile of keys, its own chunk's first.
struct QueryWalk {
  int chunk, token, first, last, chunk_start;
  int distance = -1, start = 0, high = 0;  // this tile: queries [start, start + kRows) below high

  __device__ QueryWalk(int size, const KeyTile& tile)
      : chunk(size),
        token(tile.token),
        first(tile.first),
        last(tile.last),
        chunk_start(tile.token / size * size - size) {}

  __device__ bool next() {
    start += kRows;
    while (start >= high) {
      chunk_start += chunk;
      ++distance;
      if (chunk_start >= last) {
        return false;
      }
      start = max(chunk_start, max(first, token));
      high = min(chunk_start + chunk, last);
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

// `rows` rows of accumulators times a factor to memory, `step` numbers apart, as T or fp32.
template <class T, int N>
__device__ void store(T* to, int64_t step, int rows, const Lane& lane, const float (&x)[N],
                      float factor) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane.row() + 8 * h;
    if (row < rows) {
#pragma unroll
      for (int i = 2 * h; i < N; i += 4) {
        T* at = to + row * step + i / 4 * 8 + lane.column();
        if constexpr (std::is_same_v<T, float>) {
          *reinterpret_cast<float2*>(at) = {x[i] * factor, x[i + 1] * factor};
        } else {
          *reinterpret_cast<uint32_t*>(at) = pack<T>(x[i] * factor, x[i + 1] * factor);
        }
      }
    }
  }
}

// ---- forward

template <int D>
struct ForwardShared {
  Tile<kRows, D> query[2];
  Tile<kKeys, D> key[kStages], value[kStages];
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
  const int seen = walk.high - walk.start, column_of_row = token + lane.row() - walk.start;
  lane.each(s, [&](float& x, int h, int column) {
    x = column < seen && column <= column_of_row + 8 * h ? x : -INFINITY;
  });
}

template <class T, int D>
__global__ void __launch_bounds__(kBlock, 1)
    forward_kernel(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                   const Attention problem, const T* __restrict__ q, T* __restrict__ out,
                   float* __restrict__ lse) {
  constexpr int N = kKeys;
  auto& shared = dynamic_shared<ForwardShared<D>>();
  const int head = blockIdx.x % problem.heads, kv = head / (problem.heads / problem.kv_heads);
  const QueryTile tile(problem.tile_list, blockIdx.x / problem.heads);
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

    const auto rotate_query = [&] {  // if the distance is a new one
      if (walk.distance != turned) {
        turned = walk.distance;
        sync_threads(1 + warpgroup, kWarpgroup);  // no warp still multiplies the old one
        rotate(problem, q + at, step, rows, token - walk.chunk_start, turned, thread, query);
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
    rotate_query();
    wait(shared.key_full[keys.stage], keys.parity);
    multiply_transposed<T, N, D>(s, query, shared.key[keys.stage]);
    wgmma_wait<0>(s);
    release(shared.key_empty[keys.stage], thread);
    mask_edge();
    softmax.update(s, fade);
    pack_operand<T, N>(p, s);
    while (walk.next(N)) {  // the next logits under way while this tile's values are summed
      keys.next();
      rotate_query();
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
      fade[h] = 1.0f / mass;
      const int row = lane.row() + 8 * h;
      if (row < rows && lane.column() == 0) {
        lse[static_cast<int64_t>(tile.row + first + row) * problem.heads + head] =
            (softmax.top[h] + log2f(mass)) / kLog2e;
      }
    }
    lane.each(o, [&](float& x, int h, int) { x *= fade[h]; });
    store(out + at, step, rows, lane, o, 1.0f);
  }
}

// ---- backward: two kernels, one stationary in the queries and one in the keys, without atomics

template <int D>
struct QueryGradientShared {
  Tile<kRows, D> query[2], given[2];  // given: the gradient of out
  Tile<kKeys, D> key[kStages], value[kStages];
  Barrier given_full, full[kStages], empty[kStages];
};

template <class T, int D>
__global__ void __launch_bounds__(kBlock, 1)
    query_gradient_kernel(const __grid_constant__ TensorMap d_out_map,
                          const __grid_constant__ TensorMap k_map,
                          const __grid_constant__ TensorMap v_map, const Attention problem,
                          const T* __restrict__ q, const float* __restrict__ lse,
                          const float* __restrict__ delta, T* __restrict__ d_q) {
  constexpr int N = kKeys;
  auto& shared = dynamic_shared<QueryGradientShared<D>>();
  const int head = blockIdx.x % problem.heads, kv = head / (problem.heads / problem.kv_heads);
  const QueryTile tile(problem.tile_list, blockIdx.x / problem.heads);
  const int consumers = tile.rows > kRows ? 2 : 1;
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    init(shared.given_full, 1);
    for (int i = 0; i < kStages; ++i) {
      init(shared.full[i], 1);
      init(shared.empty[i], 4 * consumers);  // warps
    }
    fence_init();
  }
  sync_block();

  if (warpgroup == 2) {
    shrink_registers<24>();
    if (thread == 0) {
      arrive_expecting(shared.given_full, consumers * sizeof(shared.given[0]));
      for (int i = 0; i < consumers; ++i) {
        load(shared.given[i], d_out_map, shared.given_full, head, tile.row + i * kRows);
      }
      KeyWalk walk(problem.chunk, tile.token, tile.token + tile.rows);
      for (Ring ring; walk.next(N); ring.next()) {
        const int i = ring.stage, row = tile.keys + walk.start;
        wait(shared.empty[i], ring.parity ^ 1);
        arrive_expecting(shared.full[i], sizeof(shared.key[i]) + sizeof(shared.value[i]));
        load(shared.key[i], k_map, shared.full[i], kv, row);
        load(shared.value[i], v_map, shared.full[i], kv, row);
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
    const int index = token - walk.chunk_start;
    float s[N / 2], d[N / 2], sum[D / 2], shift[2], mean[2];
    uint32_t ds[N / 16][4];
    int turned = -1;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = tile.row + first + min(lane.row() + 8 * h, rows - 1);
      const int64_t number = static_cast<int64_t>(row) * problem.heads + head;
      shift[h] = lse[number] * kLog2e;
      mean[h] = delta[number];
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      sum[i] = 0.0f;
    }
    wait(shared.given_full, 0);
    for (Ring ring; walk.next(N); ring.next()) {
      if (walk.distance != turned) {  // the sum changes its basis together with the query
        if (turned >= 0) {
          turn(problem, sum, lane, rows, index, turned, -1.0f);
          turn(problem, sum, lane, rows, index, walk.distance, 1.0f);
        }
        turned = walk.distance;
        sync_threads(1 + warpgroup, kWarpgroup);  // no warp still multiplies the old query
        rotate(problem, q + at, step, rows, index, turned, thread, query);
        sync_threads(1 + warpgroup, kWarpgroup);
      }
      const auto& key = shared.key[ring.stage];
      wait(shared.full[ring.stage], ring.parity);
      multiply_transposed<T, N, D>(s, query, key);
      multiply_transposed<T, N, D>(d, shared.given[warpgroup], shared.value[ring.stage]);
      wgmma_wait<1>(s);
      if (walk.start + N > min(walk.high, token + 1)) {
        mask(s, lane, walk, token);
      }
      lane.each(s, [&](float& x, int h, int) { x = exp2_fast(x - shift[h]); });
      wgmma_wait<0>(d);
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        d[i] = s[i] * (d[i] - mean[i / 2 % 2]);
      }
      pack_operand<T, N>(ds, d);
      multiply_add<T, N, D>(sum, ds, key);
      wgmma_wait<0>(sum);
      release(shared.empty[ring.stage], thread);
    }
    turn(problem, sum, lane, rows, index, turned, -1.0f);
    store(d_q + at, step, rows, lane, sum, problem.scale);
  }
}

template <int D>
struct KeyGradientShared {
  Tile<kRows, D> key[2], value[2], query[kStages], given[kStages];
  float shift[kStages][kRows], mean[kStages][kRows];
  Barrier own_full, full[kStages], empty[kStages];
};

template <class T, int D>
__global__ void __launch_bounds__(kBlock, 1)
    key_gradient_kernel(const __grid_constant__ TensorMap d_out_map,
                        const __grid_constant__ TensorMap k_map,
                        const __grid_constant__ TensorMap v_map, const Attention problem,
                        const T* __restrict__ q, const float* __restrict__ lse,
                        const float* __restrict__ delta, float* __restrict__ d_k,
                        T* __restrict__ d_v) {
  auto& shared = dynamic_shared<KeyGradientShared<D>>();
  const int kv = blockIdx.x % problem.kv_heads, group = problem.heads / problem.kv_heads;
  const KeyTile tile(problem.tile_list, blockIdx.x / problem.kv_heads);
  const int consumers = tile.rows > kRows ? 2 : 1;
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    init(shared.own_full, 1);
    for (int i = 0; i < kStages; ++i) {
      init(shared.full[i], kWarpgroup + 1);  // those who rotate, and the copy's bytes
      init(shared.empty[i], 4 * consumers);  // warps
    }
    fence_init();
  }
  sync_block();
  QueryWalk walk(problem.chunk, tile);
  Ring ring;

  if (warpgroup == 2) {
    shrink_registers<56>();
    if (thread == 0) {
      const int bytes = sizeof(shared.key[0]) + sizeof(shared.value[0]);
      arrive_expecting(shared.own_full, consumers * bytes);
      for (int i = 0; i < consumers; ++i) {
        load(shared.key[i], k_map, shared.own_full, kv, tile.row + i * kRows);
        load(shared.value[i], v_map, shared.own_full, kv, tile.row + i * kRows);
      }
    }
    const int64_t step = static_cast<int64_t>(problem.heads) * D;
    while (walk.next()) {  // heads inside: a tile's angles stay in the cache
      const int row = tile.queries + walk.start - tile.first;
      const int rows = min(walk.high - walk.start, kRows);
      for (int head = kv * group; head < (kv + 1) * group; ++head, ring.next()) {
        const int i = ring.stage;
        wait(shared.empty[i], ring.parity ^ 1);
        if (thread == 0) {
          arrive_expecting(shared.full[i], sizeof(shared.given[i]));
          load(shared.given[i], d_out_map, shared.full[i], head, row);
        }
        if (thread < kRows) {  // a query past the end has no mass
          const int64_t number = static_cast<int64_t>(row + thread) * problem.heads + head;
          shared.shift[i][thread] = thread < rows ? lse[number] * kLog2e : INFINITY;
          shared.mean[i][thread] = thread < rows ? delta[number] : 0.0f;
        }
        rotate(problem, q + row * step + head * D, step, rows, walk.start - walk.chunk_start,
               walk.distance, thread, shared.query[i]);
        arrive(shared.full[i]);
      }
    }
  } else if (warpgroup < consumers) {
    grow_registers<224>();
    const Lane lane{thread};
    const int first = warpgroup * kRows, token = tile.token + first;
    const auto& key = shared.key[warpgroup];
    const auto& value = shared.value[warpgroup];
    float s[kRows / 2], d[kRows / 2], key_sum[D / 2], value_sum[D / 2];  // s, d: (keys, queries)
    uint32_t p[kRows / 16][4], ds[kRows / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      key_sum[i] = value_sum[i] = 0.0f;
    }
    wait(shared.own_full, 0);
    while (walk.next()) {
      for (int head = 0; head < group; ++head, ring.next()) {
        const int i = ring.stage;
        wait(shared.full[i], ring.parity);
        if (walk.start + kRows > token) {  // else all these queries come before all these keys
          multiply_transposed<T, kRows, D>(s, key, shared.query[i]);
          multiply_transposed<T, kRows, D>(d, value, shared.given[i]);
          wgmma_wait<1>(s);
          if (walk.start < token + kRows - 1) {
            const int before = token + lane.row() - walk.start;
            lane.each(s, [&](float& x, int h, int column) {
              x = column < before + 8 * h ? -INFINITY : x;
            });
          }
          lane.each(s,
                    [&](float& x, int, int column) { x = exp2_fast(x - shared.shift[i][column]); });
          wgmma_wait<0>(d);
          lane.each(d, [&](float& x, int, int column) { x -= shared.mean[i][column]; });
#pragma unroll
          for (int j = 0; j < kRows / 2; ++j) {
            d[j] *= s[j];
          }
          pack_operand<T, kRows>(p, s);
          pack_operand<T, kRows>(ds, d);
          multiply_add<T, kRows, D>(value_sum, p, shared.given[i]);
          multiply_add<T, kRows, D>(key_sum, ds, shared.query[i]);
          wgmma_wait<0>(key_sum, value_sum);
        }
        release(shared.empty[i], thread);
      }
    }
    const int64_t step = static_cast<int64_t>(problem.kv_heads) * D;
    const int64_t at = (tile.row + first) * step + kv * D;
    const int rows = min(tile.rows - first, kRows);
    store(d_v + at, step, rows, lane, value_sum, 1.0f);
    store(d_k + at, step, rows, lane, key_sum, 1.0f / kLog2e);  // the query has the scale
  }
}

// launch(element, head dimension, maps of the operands) for what the kernels are made for.
template <class Launch>
cudaError_t with_maps(const Attention& problem, const void* d_out, const void* k, const void* v,
                      const Launch& launch) {
  const auto run = [&](auto element, auto dim) {
    using T = decltype(element);
    TensorMap d_out_map, k_map, v_map;
    cudaError_t error = tensor_map<T>(&k_map, k, dim, problem.kv_heads, problem.keys);
    if (error == cudaSuccess) {
      error = tensor_map<T>(&v_map, v, dim, problem.kv_heads, problem.keys);
    }
    if (error == cudaSuccess) {
      error = tensor_map<T>(&d_out_map, d_out, dim, problem.heads, problem.queries);
    }
    return error == cudaSuccess ? launch(element, dim, d_out_map, k_map, v_map) : error;
  };
  if (problem.tiles == 0) {
    return cudaSuccess;
  }
  const std::integral_constant<int, 64> narrow;
  const std::integral_constant<int, 128> wide;
  if (problem.type == 0 && problem.dim == narrow) {
    return run(Bf16{}, narrow);
  } else if (problem.type == 0 && problem.dim == wide) {
    return run(Bf16{}, wide);
  } else if (problem.type == 1 && problem.dim == narrow) {
    return run(Fp16{}, narrow);
  } else if (problem.type == 1 && problem.dim == wide) {
    return run(Fp16{}, wide);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t attention_forward(Attention problem, const void* q, const void* k, const void* v,
                              void* out, float* lse, cudaStream_t stream) {
  return with_maps(problem, q, k, v, [&](auto element, auto dim, auto&, auto& k_map, auto& v_map) {
    using T = decltype(element);
    return launch(forward_kernel<T, dim>, problem.tiles * problem.heads, kBlock,
                  sizeof(ForwardShared<dim>), stream, k_map, v_map, problem,
                  static_cast<const T*>(q), static_cast<T*>(out), lse);
  });
}

cudaError_t attention_query_gradient(Attention problem, const void* d_out, const void* q,
                                     const void* k, const void* v, const float* lse,
                                     const float* delta, void* d_q, cudaStream_t stream) {
  return with_maps(problem, d_out, k, v, [&](auto element, auto dim, auto&... maps) {
    using T = decltype(element);
    return launch(query_gradient_kernel<T, dim>, problem.tiles * problem.heads, kBlock,
                  sizeof(QueryGradientShared<dim>), stream, maps..., problem,
                  static_cast<const T*>(q), lse, delta, static_cast<T*>(d_q));
  });
}

cudaError_t attention_key_gradient(Attention problem, const void* d_out, const void* q,
                                   const void* k, const void* v, const float* lse,
                                   const float* delta, float* d_k, void* d_v, cudaStream_t stream) {
  return with_maps(problem, d_out, k, v, [&](auto element, auto dim, auto&... maps) {
    using T = decltype(element);
    return launch(key_gradient_kernel<T, dim>, problem.tiles * problem.kv_heads, kBlock,
                  sizeof(KeyGradientShared<dim>), stream, maps..., problem,
                  static_cast<const T*>(q), lse, delta, d_k, static_cast<T*>(d_v));
  });
}

}  // namespace q3mega::cuda
