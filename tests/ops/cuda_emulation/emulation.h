// csrc/cuda/sm90.h on a CPU: what its functions mean, after the PTX ISA, one block at a time.
//
// A thread of the block is a fiber; it runs until it waits. What the hardware leaves open is
// decided against the kernel. Shared memory starts as NaN. An ordinary store of a tensor core's
// operand is invisible until its thread's proxy fence. Accumulators change at the wait, not before.
// And a run is one of two: in the first, copies land as late as their barrier lets them and wgmma
// reads its operands when the first thread issues it, so that a missing wait or barrier reads NaN;
// in the second, copies land at once and wgmma reads at the wait, so that a buffer given back too
// early is read overwritten. Descriptors, swizzle and fragments are decoded bit by bit, so that a
// wrong layout is a wrong number.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <type_traits>
#include <vector>

// ---- the words of CUDA that the kernels use

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  int x;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline dim3 threadIdx, blockIdx;
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

// ---- tensor maps, as cuTensorMapEncodeTiled takes and refuses them

using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct CUtensorMap {  // of rank 3 and two-byte elements
  const uint8_t* base;
  uint64_t sizes[3], strides[3];  // strides in bytes
  uint32_t box[3];
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, uint32_t rank,
                                       void* base, const uint64_t* sizes, const uint64_t* strides,
                                       const uint32_t* box, const uint32_t* steps,
                                       CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool fine = rank == 3 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  fine = fine && swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * 2 <= 128;
  for (int i = 0; i < 3; ++i) {
    fine = fine && sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32;
    fine = fine && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
    map->strides[i] = i == 0 ? 2 : strides[i - 1];
    fine = fine && (i == 0 || (map->strides[i] % 16 == 0 && map->strides[i] < uint64_t{1} << 40));
  }
  map->base = static_cast<const uint8_t*>(base);
  return fine ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

namespace q3mega::emulation {

inline bool late_reads = false;  // the second kind of run
extern "C" [[gnu::used]] inline void emulate_late_reads(int on) { late_reads = on; }

constexpr int kWarp = 32, kStack = 1 << 17;
constexpr uint32_t kBase = 1024;  // the address of shared memory's first byte

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <class T>
float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<T, sm90::Bf16>) {
    return from_bits(static_cast<uint32_t>(bits) << 16);
  } else {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return static_cast<float>(x);
  }
}

template <class T>
uint16_t rounded(float x) {  // to nearest even
  uint32_t bits;
  if constexpr (std::is_same_v<T, sm90::Bf16>) {
    std::memcpy(&bits, &x, 4);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  } else {
    const _Float16 half = static_cast<_Float16>(x);
    uint16_t found;
    std::memcpy(&found, &half, 2);
    return found;
  }
}

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done = true;
  int thread = 0, issued = 0;                   // wgmmas
  std::vector<int> groups;                      // wgmmas issued at each commit
  std::vector<std::pair<void*, uint4>> stores;  // of operands, before the fence
  int shuffles = 0;
};

struct Meeting {  // of threads at one barrier
  int arrived = 0, generation = 0;
};

struct Mbarrier {
  int count = 0, arrived = 0, bytes = 0;
  uint32_t phase = 0;
  std::vector<std::function<void()>> copies;  // under way
};

struct Product {  // one warp's 16 rows of a wgmma
  int n = 0, arrived = 0;
  bool accumulate = false;
  uint64_t a = 0, b = 0;
  float* d[kWarp];
  std::vector<float> left, right;  // (16, 16) and (n, 16), once read
  std::function<void(Product&)> read;
};

struct Warp {
  std::deque<Product> products;
  int finished = 0;  // and dropped from the front
  float shuffled[2][kWarp];
};

class Block {
 public:
  Block(int threads, int bytes) : threads_(threads), size_(bytes) {
    memory_.assign(bytes + 1024, 0xff);
    base_ = memory_.data() + (1024 - reinterpret_cast<uintptr_t>(memory_.data()) % 1024) % 1024;
  }

  // Whether every thread came to its end.
  bool run(const std::function<void()>& body) {
    static std::vector<std::unique_ptr<Fiber>> pool;
    while (static_cast<int>(pool.size()) < threads_) {
      pool.push_back(std::make_unique<Fiber>());
    }
    body_ = &body;
    for (int i = 0; i < threads_; ++i) {
      Fiber& f = *pool[i];
      f.thread = i;
      f.done = false;
      f.issued = f.shuffles = 0;
      f.groups.clear();
      f.stores.clear();
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = &scheduler_;
      makecontext(&f.context, &Block::enter, 0);
    }
    block = this;
    for (bool left = true; left && !failed_;) {
      left = false;
      const int64_t before = progress_;
      for (int i = 0; i < threads_ && !failed_; ++i) {
        if (!pool[i]->done) {
          left = true;
          fiber = pool[i].get();
          threadIdx.x = i;
          swapcontext(&scheduler_, &fiber->context);
        }
      }
      if (left && progress_ == before) {
        fail("every thread waits");
      }
    }
    return !failed_;
  }

  [[gnu::noinline]] void fail(const char* why) {
    std::fprintf(stderr, "block %d, thread %d: %s\n", blockIdx.x, threadIdx.x, why);
    failed_ = true;
  }

  void expect(bool fine, const char* what) {
    if (!fine) {
      fail(what);
      wait_until([] { return false; });
    }
  }

  template <class Condition>
  void wait_until(const Condition& condition) {
    Fiber* own = fiber;
    while (!condition()) {
      swapcontext(&own->context, &scheduler_);
    }
    ++progress_;
  }

  // Lets the other threads run on for a while.
  void dawdle() {
    for (int i = 0; i < 40; ++i) {
      int turns = 0;
      wait_until([&] { return turns++ > 0; });
    }
  }

  // The last of `count` threads does `action` before any goes on.
  template <class Action>
  void meet(int barrier, int count, const Action& action) {
    Meeting& m = meetings_[barrier];
    const int generation = m.generation;
    if (++m.arrived == count) {
      action();
      m.arrived = 0;
      ++m.generation;
      ++progress_;
    } else {
      wait_until([&] { return m.generation != generation; });
    }
  }

  uint8_t* base() { return base_; }
  int threads() const { return threads_; }
  Mbarrier& mbarrier(const void* at) { return mbarriers_[at]; }
  Warp& warp() { return warps_[fiber->thread / kWarp]; }

  uint8_t* bytes(uint32_t address, int count) {
    expect(address >= kBase && address + count <= kBase + size_, "outside of shared memory");
    return base_ + (address - kBase);
  }

  // If the phase has all its arrivals and bytes, it ends.
  void settle(Mbarrier& barrier) {
    if (barrier.arrived == barrier.count && barrier.bytes == 0) {
      barrier.arrived = 0;
      ++barrier.phase;
    }
  }

  static inline Block* block = nullptr;
  static inline Fiber* fiber = nullptr;

 private:
  static void enter() {
    (*block->body_)();
    fiber->done = true;
    ++block->progress_;
  }

  int threads_, size_;
  bool failed_ = false;
  int64_t progress_ = 0;
  std::vector<uint8_t> memory_;
  uint8_t* base_;
  const std::function<void()>* body_;
  ucontext_t scheduler_;
  std::map<int, Meeting> meetings_;
  std::map<const void*, Mbarrier> mbarriers_;
  std::map<int, Warp> warps_;
};

inline Block& block() { return *Block::block; }
inline Fiber& fiber() { return *Block::fiber; }

// The 128-byte swizzle: bits 4-6 of an address are xored with bits 7-9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Rows [first, last) of an operand whose rows are the product's M or N, each of 16, from a
// descriptor (PTX ISA, "Matrix descriptor format" and "Canonical layouts", 128-byte swizzle).
template <class T>
std::vector<float> operand(uint64_t descriptor, int first, int last, bool k_major) {
  block().expect(descriptor >> 62 == 1, "not the 128-byte swizzle");
  block().expect((descriptor >> 49 & 7) == 0, "a base offset");
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  std::vector<float> x((last - first) * 16);
  for (int row = first; row < last; ++row) {
    for (int k = 0; k < 16; ++k) {
      // K-major: octets of rows, 128 bytes a row. Otherwise octets of k, 64 rows a line of 128.
      const uint32_t at = k_major
                              ? row / 8 * stride + row % 8 * 128 + k * 2
                              : row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2;
      uint16_t bits;
      std::memcpy(&bits, block().bytes(swizzled(start + at), 2), 2);
      x[(row - first) * 16 + k] = to_float<T>(bits);
    }
  }
  return x;
}

// The next wgmma of the calling thread; the warp's first to come makes it.
inline Product& issue(uint64_t a, uint64_t b, int n, bool accumulate, float* d,
                      const std::function<void(Product&)>& read) {
  Warp& warp = block().warp();
  const size_t at = fiber().issued++ - warp.finished;
  if (at == warp.products.size()) {
    warp.products.emplace_back();
    Product& fresh = warp.products.back();
    fresh.n = n;
    fresh.a = a;
    fresh.b = b;
    fresh.accumulate = accumulate;
    fresh.left.assign(16 * 16, 0.0f);
    if (late_reads) {
      fresh.read = read;
    } else {
      read(fresh);
    }
  }
  Product& p = warp.products[at];
  block().expect(p.n == n && p.a == a && p.b == b && p.accumulate == accumulate,
                 "threads of a warp issue different wgmmas");
  p.d[fiber().thread % kWarp] = d;
  ++p.arrived;
  return p;
}

inline void finish(Product& p) {
  block().expect(p.arrived == kWarp, "a wgmma that not all threads issued");
  if (p.read) {
    p.read(p);
  }
  std::vector<float> columns(16 * p.n);
  for (int j = 0; j < p.n; ++j) {
    for (int k = 0; k < 16; ++k) {
      columns[k * p.n + j] = p.right[j * 16 + k];
    }
  }
  std::vector<float> sum(p.n);
  for (int i = 0; i < 16; ++i) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int k = 0; k < 16; ++k) {
      const float x = p.left[i * 16 + k];
      const float* y = columns.data() + k * p.n;
      for (int j = 0; j < p.n; ++j) {
        sum[j] += x * y[j];
      }
    }
    // PTX ISA, "Register fragments", D of m64nNk16.
    for (int j = 0; j < p.n; ++j) {
      float& d = p.d[i % 8 * 4 + j % 8 / 2][j / 8 * 4 + i / 8 * 2 + j % 2];
      d = sum[j] + (p.accumulate ? d : 0.0f);
    }
  }
}

}  // namespace q3mega::emulation

namespace q3mega::sm90 {

using TensorMap = CUtensorMap;
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
using emulation::block;
using emulation::fiber;

template <class T>
uint32_t pack(float low, float high) {
  return emulation::rounded<T>(low) | static_cast<uint32_t>(emulation::rounded<T>(high)) << 16;
}

template <class T>
float2 unpack(uint32_t pair) {
  return {emulation::to_float<T>(pair), emulation::to_float<T>(pair >> 16)};
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline void sync_warp() {
  block().meet(1000 + fiber().thread / 32, 32, [] {});
}

inline float shuffle_xor(float x, int mask) {
  float* lanes = block().warp().shuffled[fiber().shuffles++ % 2];
  lanes[fiber().thread % 32] = x;
  sync_warp();
  return lanes[(fiber().thread ^ mask) % 32];
}

template <int N>
void shrink_registers() {}

template <int N>
void grow_registers() {}

template <class Shared>
Shared& dynamic_shared() {
  block().expect(block().base() != nullptr, "no shared memory");
  return *reinterpret_cast<Shared*>(block().base());
}

inline uint32_t shared_address(const void* x) {
  return emulation::kBase + (static_cast<const uint8_t*>(x) - block().base());
}

inline void store_operand(void* at, uint4 x) { fiber().stores.emplace_back(at, x); }

inline void fence_async() {
  for (const auto& [at, x] : fiber().stores) {
    std::memcpy(block().bytes(shared_address(at), 16), &x, 16);
  }
  fiber().stores.clear();
}

inline void sync_threads(int barrier, int threads) {
  block().meet(barrier, threads, [] {});
}

inline void sync_block() { sync_threads(0, block().threads()); }

inline void init(Barrier& barrier, int arrivals) { block().mbarrier(&barrier).count = arrivals; }

inline void fence_init() {}

inline void arrive(Barrier& barrier) {
  emulation::Mbarrier& b = block().mbarrier(&barrier);
  block().expect(++b.arrived <= b.count, "more arrivals than the mbarrier counts");
  block().settle(b);
}

inline void arrive_expecting(Barrier& barrier, int bytes) {
  block().mbarrier(&barrier).bytes += bytes;
  arrive(barrier);
}

inline void wait(Barrier& barrier, uint32_t parity) {
  emulation::Mbarrier& b = block().mbarrier(&barrier);
  block().wait_until([&] {
    if (b.phase % 2 == parity && b.arrived == b.count) {
      for (const auto& copy : b.copies) {
        copy();
      }
      b.copies.clear();
      block().settle(b);
    }
    return b.phase % 2 != parity;
  });
}

inline void copy_box(void* to, const TensorMap& map, Barrier& barrier, int column, int head,
                     int row) {
  emulation::Mbarrier& b = block().mbarrier(&barrier);
  const auto copy = [=, &b] {
    const uint32_t start = shared_address(to);
    block().expect(start % 128 == 0, "a box at an address that is not a multiple of 128");
    uint32_t at = 0;
    for (uint32_t r = 0; r < map.box[2]; ++r) {
      for (uint32_t h = 0; h < map.box[1]; ++h) {
        for (uint32_t c = 0; c < map.box[0]; ++c, at += 2) {
          const uint64_t x = column + c, y = head + h, z = row + r;
          const bool inside = x < map.sizes[0] && y < map.sizes[1] && z < map.sizes[2];
          uint16_t bits = 0;
          if (inside) {
            std::memcpy(&bits, map.base + x * 2 + y * map.strides[1] + z * map.strides[2], 2);
          }
          std::memcpy(block().bytes(emulation::swizzled(start + at), 2), &bits, 2);
        }
      }
    }
    b.bytes -= at;
    block().expect(b.bytes >= 0, "more bytes than the mbarrier expects");
  };
  if (emulation::late_reads) {
    copy();
    block().settle(b);
  } else {
    b.copies.push_back(copy);
  }
}

inline void wgmma_fence() {}

inline void wgmma_commit() { fiber().groups.push_back(fiber().issued); }

template <int Pending, int... Sizes>
void wgmma_wait(float (&... done)[Sizes]) {
  const std::vector<int>& groups = fiber().groups;
  const int last = static_cast<int>(groups.size()) - 1 - Pending;
  emulation::Warp& warp = block().warp();
  if (emulation::late_reads && (fiber().thread / emulation::kWarp + blockIdx.x) % 4 == 0) {
    block().dawdle();
  }
  block().meet(2000 + fiber().thread / emulation::kWarp, emulation::kWarp, [&] {
    for (; last >= 0 && warp.finished < groups[last]; ++warp.finished) {
      emulation::finish(warp.products.front());
      warp.products.pop_front();
    }
  });
}

template <class T, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  const int row = fiber().thread / emulation::kWarp % 4 * 16;
  emulation::issue(a, b, N, accumulate, d, [=](emulation::Product& p) {
    p.left = emulation::operand<T>(a, row, row + 16, true);
    p.right = emulation::operand<T>(b, 0, N, true);
  });
}

template <class T, int N>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  emulation::Product& p = emulation::issue(0, b, N, true, d, [=](emulation::Product& p) {
    p.right = emulation::operand<T>(b, 0, N, false);
  });
  // PTX ISA, "Register fragments", A of m64k16: two columns a register, rows 8 apart, columns 8.
  const int lane = fiber().thread % emulation::kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
    const float2 pair = unpack<T>(a[i]);
    p.left[row * 16 + k] = pair.x;
    p.left[row * 16 + k + 1] = pair.y;
  }
}

inline cudaError_t encode_tiled(EncodeTiled* found) {
  *found = cuTensorMapEncodeTiled;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
                   cudaStream_t, const Arguments&... arguments) {
  if (shared > 232448) {  // what cudaFuncSetAttribute refuses
    return cudaErrorInvalidValue;
  }
  for (int i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    emulation::Block one(threads, shared);
    if (!one.run([&] { kernel(arguments...); })) {
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace q3mega::sm90
