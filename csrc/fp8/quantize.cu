// The kernel of quantize.h on Hopper, and its launch.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "../launch.h"
#include "fp8.h"
#include "quantize.h"

namespace r1::fp8 {

namespace {

// The machine of quantize.h: any GPU with e4m3.
struct Gpu {
  __device__ int thread() const { return threadIdx.x; }
  __device__ int tile_row() const { return blockIdx.y; }
  __device__ int tile_column() const { return blockIdx.x; }
  __device__ int batch() const { return blockIdx.z; }
  __device__ void sync_block() const { __syncthreads(); }
  __device__ float shuffle_xor(float x, int other) const { return __shfl_xor_sync(0xFFFFFFFF, x, other); }

  template <class Source>
  struct Eight {
    uint4 words[8 * sizeof(Source) / 16];
  };
  template <class Source>
  __device__ Eight<Source> load_8(const Source *from) const {
    Eight<Source> eight;
#pragma unroll
    for (int i = 0; i < 8 * sizeof(Source) / 16; ++i) eight.words[i] = __ldg(reinterpret_cast<const uint4 *>(from) + i);
    return eight;
  }
  __device__ void to_floats(float (&to)[8], const Eight<__nv_bfloat16> &from) const {
    const uint32_t pairs[4] = {from.words[0].x, from.words[0].y, from.words[0].z, from.words[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = from_bits(pairs[i] << 16);
      to[2 * i + 1] = from_bits(pairs[i] & 0xFFFF0000);
    }
  }
  __device__ void to_floats(float (&to)[8], const Eight<float> &from) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[4 * i] = from_bits(from.words[i].x), to[4 * i + 1] = from_bits(from.words[i].y);
      to[4 * i + 2] = from_bits(from.words[i].z), to[4 * i + 3] = from_bits(from.words[i].w);
    }
  }
  __device__ uint32_t to_e4m3(float a, float b, float c, float d) const {
    const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
  }
};

template <class Source, bool SQUARE, bool TRANSPOSED>
__global__ void __launch_bounds__(QUANTIZER_THREADS)
    quantize_kernel(const __grid_constant__ Quantization job, const Source *x) {
  __shared__ QuantizerShared shared;
  Quantizer<Gpu, Source, SQUARE, TRANSPOSED>{{}, job, x, shared}.run();
}

template <class Source>
void launch(const Quantization &job, const void *x, int batch, bool square, cudaStream_t stream) {
  const dim3 grid(divide_up(job.columns, BLOCK), divide_up(job.rows, BLOCK), batch);
  const auto kernel =
      square ? (job.across ? &quantize_kernel<Source, true, true> : &quantize_kernel<Source, true, false>)
             : (job.across ? &quantize_kernel<Source, false, true> : &quantize_kernel<Source, false, false>);
  kernel<<<grid, QUANTIZER_THREADS, 0, stream>>>(job, static_cast<const Source *>(x));
  check(cudaGetLastError(), "quantize_kernel");
}

}  // namespace

void quantize(const Quantization &job, const void *x, bool bfloat16, int batch, bool square, cudaStream_t stream) {
  attribute_of_current_device(cudaDevAttrMultiProcessorCount);  // names the reason where there is no driver
  bfloat16 ? launch<__nv_bfloat16>(job, x, batch, square, stream) : launch<float>(job, x, batch, square, stream);
}

}  // namespace r1::fp8
