// Every instruction of sm_90a that the kernels name, each behind one function: PTX on a device.
// With Q3MEGA_EMULATE the same functions come from tests/ops/cuda_emulation, which does on a CPU
// what the PTX ISA says that they do.
#pragma once

#include <cstdint>

namespace q3mega::sm90 {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
struct Barrier {  // an mbarrier in shared memory
  uint64_t state;
};

}  // namespace q3mega::sm90

#ifdef Q3MEGA_EMULATE
#include "emulation.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace q3mega::sm90 {

using TensorMap = CUtensorMap;

// ---- registers and warps

// (low, high) rounded to a pair of T.
template <class T>
__device__ uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <class T>
__device__ float2 unpack(uint32_t pair) {
  float2 x;
  if constexpr (std::is_same_v<T, Bf16>) {
    x = {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(x.x), "=f"(x.y)
        : "r"(pair));
  }
  return x;
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

__device__ inline void sync_warp() { __syncwarp(); }

// Registers a thread of the calling warpgroup, which the block's other warpgroups give or take.
template <int N>
__device__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- shared memory

template <class Shared>
__device__ Shared& dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<Shared*>(bytes);
}

__device__ inline uint32_t shared_address(const void* x) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(x));
}

// An ordinary store of what tensor cores read; they see it after `fence_async` of the same thread.
__device__ inline void store_operand(void* at, uint4 x) { *reinterpret_cast<uint4*>(at) = x; }

__device__ inline void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void sync_block() { __syncthreads(); }

// Among `threads` of the block that name the same barrier; 0 is sync_block's.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes barriers known to the copy engine; other threads also need sync_block.
__device__ inline void fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

__device__ inline void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

// Until the phase of that parity is complete; a fresh barrier counts phase 1 as complete.
__device__ inline void wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
          shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// One box of a tensor to shared memory; its bytes count towards the barrier's phase.
__device__ inline void copy_box(void* to, const TensorMap& map, Barrier& barrier, int column,
                                int head, int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(head), "r"(row)
      : "memory");
}

// ---- wgmma: accumulators (64, N) and left operands (64, 16) of a warpgroup in registers

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// All but the last `Pending` groups are done; `done` are the accumulators that may now be read.
template <int Pending, int... Sizes>
__device__ void wgmma_wait(float (&... done)[Sizes]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  const auto touch = [](auto& x) {  // no reading of x moves above the wait
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(x) / sizeof(float)); ++i) {
      asm volatile("" : "+f"(x[i])::"memory");
    }
  };
  (touch(done), ...);
}

// clang-format off
#define Q3MEGA_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                       "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define Q3MEGA_32(d, i) Q3MEGA_8(d, i), Q3MEGA_8(d, i + 8), Q3MEGA_8(d, i + 16), Q3MEGA_8(d, i + 24)
#define Q3MEGA_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define Q3MEGA_NAMES_64 Q3MEGA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
    "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
    "%60, %61, %62, %63"
// clang-format on
#define Q3MEGA_WGMMA(shape, type, d, operands, keep)                                         \
  "{\n.reg .pred keep;\nsetp.ne.b32 keep, " keep ", 0;\nwgmma.mma_async.sync.aligned." shape \
  ".f32." type "." type " {" d "}, " operands "\n}"

// d = a b' + (accumulate ? d : 0): a (64, 16), b (N, 16) by descriptor, both K-major.
template <class T, int N>
__device__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128);
  const int keep = accumulate;
#define Q3MEGA_PRODUCT(type)                                                                    \
  if constexpr (N == 64) {                                                                      \
    asm volatile(                                                                               \
        Q3MEGA_WGMMA("m64n64k16", type, Q3MEGA_NAMES_32, "%32, %33, keep, 1, 1, 0, 0;", "%34")  \
        : Q3MEGA_32(d, 0)                                                                       \
        : "l"(a), "l"(b), "r"(keep));                                                           \
  } else {                                                                                      \
    asm volatile(                                                                               \
        Q3MEGA_WGMMA("m64n128k16", type, Q3MEGA_NAMES_64, "%64, %65, keep, 1, 1, 0, 0;", "%66") \
        : Q3MEGA_32(d, 0), Q3MEGA_32(d, 32)                                                     \
        : "l"(a), "l"(b), "r"(keep));                                                           \
  }
  if constexpr (std::is_same_v<T, Bf16>) {
    Q3MEGA_PRODUCT("bf16")
  } else {
    Q3MEGA_PRODUCT("f16")
  }
#undef Q3MEGA_PRODUCT
}

// d += a b: a (64, 16) in registers, b (16, N) by descriptor, N-major.
template <class T, int N>
__device__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 64 || N == 128);
  const int keep = 1;
#define Q3MEGA_PRODUCT(type)                                                       \
  if constexpr (N == 64) {                                                         \
    asm volatile(Q3MEGA_WGMMA("m64n64k16", type, Q3MEGA_NAMES_32,                  \
                              "{%32, %33, %34, %35}, %36, keep, 1, 1, 1;", "%37")  \
                 : Q3MEGA_32(d, 0)                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep)); \
  } else {                                                                         \
    asm volatile(Q3MEGA_WGMMA("m64n128k16", type, Q3MEGA_NAMES_64,                 \
                              "{%64, %65, %66, %67}, %68, keep, 1, 1, 1;", "%69")  \
                 : Q3MEGA_32(d, 0), Q3MEGA_32(d, 32)                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep)); \
  }
  if constexpr (std::is_same_v<T, Bf16>) {
    Q3MEGA_PRODUCT("bf16")
  } else {
    Q3MEGA_PRODUCT("f16")
  }
#undef Q3MEGA_PRODUCT
}

// ---- the host's side

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found through the runtime: nothing links with libcuda.
inline cudaError_t encode_tiled(EncodeTiled* found) {
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", reinterpret_cast<void**>(found), 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess) {
    return error;
  }
  return result == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorSymbolNotFound;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) {
    return cudaSuccess;
  }
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(static_cast<unsigned>(blocks));
  how.blockDim = dim3(threads);
  how.dynamicSmemBytes = shared;
  how.stream = stream;
  return cudaLaunchKernelEx(&how, kernel, arguments...);
}

}  // namespace q3mega::sm90
#endif

namespace q3mega::sm90 {

// Shared memory as wgmma reads it with the 128-byte swizzle: addresses are those of 8 rows of 128
// bytes. `group` is the byte offset between such octets of rows; `panel`, for an N-major operand
// wider than 64, that between its columns of 64.
__device__ inline uint64_t descriptor(uint32_t address, uint32_t group, uint32_t panel) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) |
         static_cast<uint64_t>(panel >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(group >> 4 & 0x3fff) << 32 | uint64_t{1} << 62;
}

// Boxes of 64 rows and 64 columns of one head of x (rows, heads, dim), swizzled by 128 bytes, zero
// past the last row.
template <class T>
cudaError_t tensor_map(TensorMap* map, const void* x, int dim, int heads, int64_t rows) {
  EncodeTiled encode;
  const cudaError_t error = encode_tiled(&encode);
  if (error != cudaSuccess) {
    return error;
  }
  const uint64_t row = 2 * dim;  // bytes
  const cuuint64_t sizes[] = {static_cast<uint64_t>(dim), static_cast<uint64_t>(heads),
                              static_cast<uint64_t>(rows)};
  const cuuint64_t strides[] = {row, row * heads};
  const cuuint32_t box[] = {64, 1, 64}, steps[] = {1, 1, 1};
  const bool fine =
      encode(map,
             std::is_same_v<T, Bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                     : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             3, const_cast<void*>(x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  return fine ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace q3mega::sm90
