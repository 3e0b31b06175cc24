// The machine of machine.h on Hopper (sm_90a): what is one instruction there, and nothing else.
// Names of instructions are those of the PTX ISA 8.0.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include "fp8/layout.h"

namespace r1 {

// clang-format off
#define R1_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R1_16(d, i) R1_4(d, i), R1_4(d, i + 4), R1_4(d, i + 8), R1_4(d, i + 12)
// clang-format on

// d (64 x 64 or 64 x 128 of a warp group) = a (64 x 32) @ b.T, or added to d.
__device__ __forceinline__ void warp_group_product(float (&d)[32], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1;\n}\n"
      : R1_16(d, 0), R1_16(d, 16)
      : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void warp_group_product(float (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, "
      "1;\n}\n"
      : R1_16(d, 0), R1_16(d, 16), R1_16(d, 32), R1_16(d, 48)
      : "l"(a), "l"(b), "r"(add));
}

#undef R1_4
#undef R1_16

struct Hopper {
  __device__ int thread() const { return threadIdx.x; }
  __device__ int block() const { return blockIdx.x; }
  __device__ int blocks() const { return gridDim.x; }
  // What is the same in a whole warp, in a register that says so.
  __device__ int same_in_warp(int x) const { return __shfl_sync(0xFFFFFFFF, x, 0); }
  __device__ static uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }

  // ---------------------------------------------------------------------------------------------- barriers

  __device__ void make_barrier(uint64_t *barrier, int arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  }
  __device__ void publish_barriers() const { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
  __device__ void wait(uint64_t *barrier, uint32_t parity) const {
    asm volatile(
        "{\n.reg .pred p;\nWAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}\n" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
  }
  __device__ void arrive_expecting(uint64_t *barrier, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
  }
  // At the same barrier of the cluster's block number `rank`. Without .release.cluster, which would wait for all stores
  // of the block: what the barrier guards has only been read.
  __device__ void arrive_at(uint64_t *barrier, int rank) const {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
  }
  __device__ void sync_cluster() const {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  }
  __device__ void sync_consumers() const { asm volatile("bar.sync 1, 256;" ::: "memory"); }
  __device__ void sync_warp() const { __syncwarp(); }

  // ---------------------------------------------------------------------------------------------- copies

  __device__ void copy_tile(void *to, const CUtensorMap &map, int x, int y, uint64_t *barrier) const {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(x), "r"(y), "r"(shared_address(barrier))
        : "memory");
  }
  // To the same place of both blocks of the cluster; each one's own barrier counts the bytes.
  __device__ void copy_tile_to_both(void *to, const CUtensorMap &map, int x, int y, uint64_t *barrier) const {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(&map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(3))
        : "memory");
  }
  // A zero if it is not there.
  __device__ void copy_float(float *to, const float *from, bool there) const {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 4 : 0)
                 : "memory");
  }
  __device__ void arrive_when_copied(uint64_t *barrier) const {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
  }
  __device__ void show_copy_engine() const { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  // ---------------------------------------------------------------------------------------------- products

  // Starts part (64 x COLUMNS) = a (64 x 128) @ b (COLUMNS x 128).T, both in swizzled rows of 128 bytes.
  template <int COLUMNS>
  __device__ void multiply(float (&part)[COLUMNS / 2], uint32_t a, uint32_t b, int) const {
    using fp8::MATRIX_DEPTH, fp8::matrix_descriptor, fp8::further_along;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    const uint64_t of_a = matrix_descriptor(a), of_b = matrix_descriptor(b);
#pragma unroll
    for (int depth = 0; depth < fp8::BLOCK; depth += MATRIX_DEPTH) {
      warp_group_product(part, further_along(of_a, depth), further_along(of_b, depth), depth > 0);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  template <int N>
  __device__ void wait_for_products(float (&part)[N]) const {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(part[i])::"memory");
  }
  // A fetching warp group needs few registers, a multiplying one many: 40 + 2 * 232 times 128 threads.
  __device__ void give_registers() const { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
  __device__ void take_registers() const { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }

  // ---------------------------------------------------------------------------------------------- stores

  __device__ void store_two(float *to, float first, float second) const {
    *reinterpret_cast<float2 *>(to) = make_float2(first, second);
  }
  // Added by the cache, so that nothing waits for what was there. One addition an element: the order is no question. A
  // sum that is denormal becomes 0.
  __device__ void add_two(float *to, float first, float second) const {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(first), "f"(second) : "memory");
  }
  __device__ void put_two(__nv_bfloat16 *to, float first, float second) const {
    *reinterpret_cast<__nv_bfloat162 *>(to) = __floats2bfloat162_rn(first, second);
  }
  __device__ void copy_16_bytes(void *to, const void *from) const {
    *static_cast<uint4 *>(to) = *static_cast<const uint4 *>(from);
  }
};

}  // namespace r1
