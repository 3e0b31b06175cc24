// The kernel of gemm.h on Hopper, for every kind of product, and its launch.
#include <cuda_runtime_api.h>

#include <array>

#include "../hopper.cuh"
#include "../launch.h"
#include "choose.h"
#include "fp8.h"
#include "gemm.h"

namespace r1::fp8 {

namespace {

template <class Config>
__global__ void __cluster_dims__(PAIR, 1, 1) __launch_bounds__(THREADS, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                const __grid_constant__ Problem problem, const __grid_constant__ Scales scales,
                typename Config::Out *out) {
  extern __shared__ char memory[];
  const uint32_t begin = Hopper::shared_address(memory);
  char *shared = memory + (divide_up(begin, SWIZZLE_BYTES) * SWIZZLE_BYTES - begin);
  Gemm<Config, Hopper, CUtensorMap>{{}, problem, scales, a, b, out, shared}.run();
}

// A matrix of bytes as the copy engine takes it, in swizzled boxes of box_rows x 128. What lies outside reads as 0.
CUtensorMap tensor_map(const Matrix &matrix, int64_t rows, int columns, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(matrix.row_stride)};
  const cuuint32_t box[2] = {BLOCK, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  check(tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void *>(matrix.values), sizes, strides,
                             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "cuTensorMapEncodeTiled");
  return map;
}

template <int ROWS, int COLUMNS, Groups GROUPS, bool SQUARE, bool ACCUMULATE, class Out>
void launch(const Product &product, int pairs, int multiprocessors) {
  using Config = fp8::Config<ROWS, COLUMNS, GROUPS, SQUARE, ACCUMULATE, Out>;
  constexpr int BYTES = Config::Layout::BYTES;
  // At every launch: it holds for one device only, and gives a new thread the context that the tensor maps need.
  check(cudaFuncSetAttribute(gemm_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES),
        "cudaFuncSetAttribute");
  const Problem &problem = product.problem;
  const int64_t b_rows = int64_t{GROUPS == Groups::ROWS ? problem.experts : 1} * problem.columns;
  const CUtensorMap a = tensor_map(product.a, problem.rows, problem.depth, ROWS / PAIR);
  const CUtensorMap b = tensor_map(product.b, b_rows, problem.depth, COLUMNS);
  const int blocks = PAIR * (pairs < multiprocessors / PAIR ? pairs : multiprocessors / PAIR);
  gemm_kernel<Config>
      <<<blocks, THREADS, BYTES, product.stream>>>(a, b, problem, product.scales, static_cast<Out *>(product.out));
  check(cudaGetLastError(), "gemm_kernel");
}

template <Groups GROUPS, bool SQUARE, bool ACCUMULATE, class Out>
void launch(const Product &product, int multiprocessors) {
  const Problem &problem = product.problem;
  const bool of_rows = GROUPS == Groups::ROWS;
  const int groups = GROUPS == Groups::NONE ? 1 : problem.experts;
  // Experts' rows are known to the device alone: as many for each is the best guess, and a tile more for each the
  // bound.
  const int rows = of_rows ? divide_up(problem.rows, groups) : problem.rows;
  const int index = product.tile >= 0 ? product.tile : choose_tile(rows, groups, problem.columns, multiprocessors);
  const TileShape &tile = TILES[index];
  const int64_t tiles = of_rows ? problem.rows / tile.rows + (groups < problem.rows ? groups : problem.rows)
                                : int64_t{groups} * divide_up(problem.rows, tile.rows);
  const int64_t pairs = tiles * divide_up(problem.columns, PAIR * tile.columns);
  const int at_once = static_cast<int>(pairs < multiprocessors ? pairs : multiprocessors);
  constexpr auto launchers = std::array{&launch<TILES[0].rows, TILES[0].columns, GROUPS, SQUARE, ACCUMULATE, Out>,
                                        &launch<TILES[1].rows, TILES[1].columns, GROUPS, SQUARE, ACCUMULATE, Out>,
                                        &launch<TILES[2].rows, TILES[2].columns, GROUPS, SQUARE, ACCUMULATE, Out>};
  launchers[index](product, at_once, multiprocessors);
}

}  // namespace

void multiply(const Product &product) {
  const int multiprocessors = attribute_of_current_device(cudaDevAttrMultiProcessorCount);
  const bool half = product.out_type == OutType::BFLOAT16;
  switch (product.groups) {
    case Groups::NONE:
      if (product.square) {
        return half ? launch<Groups::NONE, true, false, __nv_bfloat16>(product, multiprocessors)
                    : launch<Groups::NONE, true, false, float>(product, multiprocessors);
      }
      return product.accumulate ? launch<Groups::NONE, false, true, float>(product, multiprocessors)
                                : launch<Groups::NONE, false, false, float>(product, multiprocessors);
    case Groups::ROWS:
      return half ? launch<Groups::ROWS, true, false, __nv_bfloat16>(product, multiprocessors)
                  : launch<Groups::ROWS, true, false, float>(product, multiprocessors);
    case Groups::DEPTH:
      return product.accumulate ? launch<Groups::DEPTH, false, true, float>(product, multiprocessors)
                                : launch<Groups::DEPTH, false, false, float>(product, multiprocessors);
  }
}

}  // namespace r1::fp8
