// What a kernel's body is written against: a machine. The GPU's is hopper.cuh, whose functions are one instruction
// each; the tests' is tests/csrc/machine.h, which runs the same bodies on a CPU, a thread for a thread.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define R1_BOTH __host__ __device__ __forceinline__
#define R1_UNROLL _Pragma("unroll")
#define R1_ROLL _Pragma("unroll 1")
#else
#define R1_BOTH inline
#define R1_UNROLL
#define R1_ROLL
#endif

namespace r1 {

R1_BOTH constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// A ring of stages in shared memory: which one is next, and the parity of its barriers' phase.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  R1_BOTH void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace r1
