// Vectors of floats as wide as the instruction set that this file is compiled for, and what is made of them.
//
// All of csrc/cpu's bodies are compiled several times, for several instruction sets, into one library. So everything
// in them has internal linkage, and of the standard library only C's functions are called: the linker keeps one copy of
// an inline function, which might be the one that this processor cannot run.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE_ROWS = 8;  // of a matrix product that are made at a time: with TILE_VECTORS they fill the registers
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int TILE_ROWS = 6;
#else
constexpr int LANES = 4;
constexpr int TILE_ROWS = 4;
#endif
constexpr int TILE_VECTORS = 2;

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vector load(const float *x) { return *reinterpret_cast<const Unaligned *>(x); }
inline void store(float *out, Vector x) { *reinterpret_cast<Unaligned *>(out) = x; }
inline Vector all(float x) { return Vector{} + x; }

// The first `count` numbers, or all there are if that is more; what is missing is 0.
inline Vector load(const float *x, int64_t count) {
  if (count >= LANES) return load(x);
  float part[LANES] = {};
  std::memcpy(part, x, count * sizeof(float));
  return load(part);
}
inline void store(float *out, Vector x, int64_t count) {
  if (count >= LANES) return store(out, x);
  float part[LANES];
  store(part, x);
  std::memcpy(out, part, count * sizeof(float));
}

// A vector's numbers added in pairs until four are left.
typedef float Four __attribute__((vector_size(16)));
inline Four folded(Vector x) {
#if defined(__AVX512F__)
  typedef float Eight __attribute__((vector_size(32)));
  const Eight half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
  return x;
#endif
}

inline float sum(Vector x) {
  const Four four = folded(x);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The sums of four vectors.
inline Four sums(Vector a, Vector b, Vector c, Vector d) {
  const Four x = folded(a), y = folded(b), z = folded(c), w = folded(d);
  const Four xy = __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
  const Four zw = __builtin_shufflevector(z, w, 0, 1, 4, 5) + __builtin_shufflevector(z, w, 2, 3, 6, 7);
  return __builtin_shufflevector(xy, zw, 0, 2, 4, 6) + __builtin_shufflevector(xy, zw, 1, 3, 5, 7);
}

inline float largest(Vector x) {
  float out = x[0];
  for (int i = 1; i < LANES; ++i) out = x[i] > out ? x[i] : out;
  return out;
}

inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

// e^x to 1e-7 of itself; 0 below the smallest normal number.
inline Vector exponential(Vector x) {
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
  const Vector shifted = x * 1.44269504f + SHIFT;
  const Vector whole = shifted - SHIFT;
  const Vector rest = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;  // ln 2, in two parts
  Vector power = all(1.0f / 5040);
  power = power * rest + 1.0f / 720;
  power = power * rest + 1.0f / 120;
  power = power * rest + 1.0f / 24;
  power = power * rest + 1.0f / 6;
  power = power * rest + 0.5f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  // 2^whole in two factors, as 2^128 is no number of its own.
  const Integers exponent = reinterpret_cast<Integers>(shifted) - 0x4B400000;
  const Integers half = exponent >> 1;
  const Vector first = reinterpret_cast<Vector>((half + 127) << 23);
  const Vector second = reinterpret_cast<Vector>((exponent - half + 127) << 23);
  const Vector out = power * first * second;
  return x < -87.3f ? all(0.0f) : (x > 88.73f ? all(__builtin_inff()) : out);
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

// Memory of one thread that grows as it is asked for more, and is kept.
struct Scratch {
  void *memory = nullptr;
  int64_t size = 0;
  ~Scratch() { __builtin_free(memory); }

  void *bytes(int64_t count) {
    if (count > size) {
      __builtin_free(memory);
      memory = __builtin_malloc(count);
      if (!memory) {
        std::fprintf(stderr, "r1._cpu: no memory for %lld bytes\n", static_cast<long long>(count));
        std::abort();
      }
      size = count;
    }
    return memory;
  }
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Threads for work of so many operations: one where starting more would take longer, else all. Never some of them:
// libgomp ends the threads that a smaller team leaves out, and starts them again for the next (pytorch#32008).
inline int threads_for(int64_t operations, int threads) {
  constexpr int64_t ENOUGH = 200000;
  return operations < ENOUGH ? 1 : threads;
}

}  // namespace
