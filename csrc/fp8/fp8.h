// What of the fp8 family the host calls.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm.h"
#include "quantize.h"

namespace r1::fp8 {

// e4m3 values; rows begin row_stride bytes apart, a multiple of 16, as the first does.
struct Matrix {
  const void *values;
  int64_t row_stride;
};

enum class OutType { FLOAT32, BFLOAT16 };

struct Product {
  Groups groups;
  bool square;      // b's scales are of 128 x 128 blocks
  bool accumulate;  // add to what out holds
  OutType out_type;
  Problem problem;
  Matrix a, b;
  Scales scales;
  void *out;  // contiguous
  int tile;   // an index into TILES, or -1 for the one that suits the shape
  cudaStream_t stream;
};

void multiply(const Product &product);

// `batch` matrices at x, bfloat16 or float32; with one scale for 128 x 128 if `square`, and the transposed values where
// job.across is there.
void quantize(const Quantization &job, const void *x, bool bfloat16, int batch, bool square, cudaStream_t stream);

}  // namespace r1::fp8
