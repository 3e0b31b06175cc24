// r1._cuda: what the CUDA runtime says of this machine's devices, and the kernels' launches.
//
// Nothing here may include torch: functions take plain numbers, so that one build serves every torch. The extension
// imports on a machine with no driver, where device_count() is 0 and status() says why.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <iterator>
#include <string>
#include <tuple>
#include <utility>

#include "fp8/choose.h"
#include "fp8/fp8.h"
#include "launch.h"

namespace py = pybind11;

namespace {

using r1::check;

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver or no device is an answer here, not an error that later calls should see
    return 0;
  }
  return count;
}

std::string status() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  return error == cudaSuccess ? "ok" : cudaGetErrorString(error);
}

int attribute(cudaDeviceAttr name, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, index), "cudaDeviceGetAttribute");
  return value;
}

py::dict device(int index) {
  const int count = device_count();
  if (index < 0 || index >= count) {
    throw py::value_error("index is " + std::to_string(index) + ", wanted 0 <= index < device_count(), which is " +
                          std::to_string(count) + " here");
  }
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  py::dict out;
  out["name"] = std::string(properties.name);
  out["compute_capability"] = py::make_tuple(properties.major, properties.minor);
  out["multiprocessors"] = properties.multiProcessorCount;
  out["memory_bytes"] = properties.totalGlobalMem;
  out["shared_memory_per_block_bytes"] = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  out["l2_cache_bytes"] = properties.l2CacheSize;
  return out;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

int driver_version() {
  int version = 0;  // stays 0 where there is no driver
  if (cudaDriverGetVersion(&version) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return version;
}

template <class Pointer>
Pointer pointer(uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

// An operand's scales: their address and the elements from one row, and from one block of 128 columns, to the next.
using ScaleArguments = std::tuple<uintptr_t, int64_t, int64_t>;

void fp8_gemm(const std::string &groups, bool square, bool accumulate, bool bfloat16, int rows, int columns, int depth,
              std::tuple<uintptr_t, int64_t> a, ScaleArguments a_scales, std::tuple<uintptr_t, int64_t> b,
              ScaleArguments b_scales, int64_t b_scales_per_expert, uintptr_t out, int experts,
              uintptr_t tokens_per_expert, bool wide_counts, int tile, uintptr_t stream) {
  using namespace r1::fp8;
  Product product{};
  product.groups = groups == "rows" ? Groups::ROWS : groups == "depth" ? Groups::DEPTH : Groups::NONE;
  product.square = square;
  product.accumulate = accumulate;
  product.out_type = bfloat16 ? OutType::BFLOAT16 : OutType::FLOAT32;
  product.problem = {rows, columns, depth, experts, pointer<const void *>(tokens_per_expert), wide_counts};
  product.a = {pointer<const void *>(std::get<0>(a)), std::get<1>(a)};
  product.b = {pointer<const void *>(std::get<0>(b)), std::get<1>(b)};
  const auto [a_address, a_row, a_block] = a_scales;
  const auto [b_address, b_row, b_block] = b_scales;
  product.scales = {pointer<const float *>(a_address),
                    pointer<const float *>(b_address),
                    a_row,
                    a_block,
                    b_scales_per_expert,
                    b_row,
                    b_block};
  product.out = pointer<void *>(out);
  product.tile = tile;
  product.stream = pointer<cudaStream_t>(stream);
  py::gil_scoped_release release;
  multiply(product);
}

// A tensor of matrices: its address and the elements from one matrix, and from one row, to the next.
using MatrixArguments = std::tuple<uintptr_t, int64_t, int64_t>;

void fp8_quantize(bool square, bool power_of_two, bool bfloat16, int batch, int rows, int columns, MatrixArguments x,
                  MatrixArguments values, MatrixArguments across, uintptr_t scales, uintptr_t across_scales,
                  uintptr_t stream) {
  using namespace r1::fp8;
  Quantization job{};
  job.rows = rows;
  job.columns = columns;
  job.power_of_two = power_of_two;
  uintptr_t x_address, values_address, across_address;
  std::tie(x_address, job.x_batch, job.x_row) = x;
  std::tie(values_address, job.values_batch, job.values_row) = values;
  std::tie(across_address, job.across_batch, job.across_row) = across;
  job.values = pointer<uint8_t *>(values_address);
  job.across = pointer<uint8_t *>(across_address);
  job.scales = pointer<float *>(scales);
  job.across_scales = pointer<float *>(across_scales);
  py::gil_scoped_release release;
  quantize(job, pointer<const void *>(x_address), bfloat16, batch, square, pointer<cudaStream_t>(stream));
}

template <size_t... TILE>
int shared_bytes(int rows, int columns, bool square, bool bfloat16, std::index_sequence<TILE...>) {
  using namespace r1::fp8;
  int bytes = 0;
  const auto look = [&](auto tile) {
    constexpr TileShape SHAPE = TILES[decltype(tile)::value];
    if (rows == SHAPE.rows && columns == SHAPE.columns) {
      const int narrow = square ? Layout<SHAPE.rows, SHAPE.columns, true, true>::BYTES
                                : Layout<SHAPE.rows, SHAPE.columns, false, true>::BYTES;
      const int wide = square ? Layout<SHAPE.rows, SHAPE.columns, true, false>::BYTES
                              : Layout<SHAPE.rows, SHAPE.columns, false, false>::BYTES;
      bytes = bfloat16 ? narrow : wide;
    }
  };
  (look(std::integral_constant<size_t, TILE>{}), ...);
  return bytes;
}

int fp8_shared_bytes(int rows, int columns, bool square, bool bfloat16) {
  return shared_bytes(rows, columns, square, bfloat16, std::make_index_sequence<std::size(r1::fp8::TILES)>{});
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "What the CUDA runtime says of this machine's devices. Needs neither torch nor a driver to import.";
  module.def("device_count", &device_count, "Number of CUDA devices; 0 where there is no driver.");
  module.def("device", &device, py::arg("index"),
             "Properties of one device: name, compute_capability (major, minor), multiprocessors, memory_bytes, "
             "shared_memory_per_block_bytes (the opt-in maximum), l2_cache_bytes. ValueError on a bad index.");
  module.def("status", &status, "\"ok\", or the CUDA runtime's reason why there are no devices.");
  module.def("runtime_version", &runtime_version, "CUDA runtime this was built with, e.g. 13000.");
  module.def("driver_version", &driver_version, "Newest CUDA version the driver supports; 0 with no driver.");
  module.def("fp8_gemm", &fp8_gemm, py::kw_only(), py::arg("groups"), py::arg("square"), py::arg("accumulate"),
             py::arg("bfloat16"), py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("a"),
             py::arg("a_scales"), py::arg("b"), py::arg("b_scales"), py::arg("b_scales_per_expert"), py::arg("out"),
             py::arg("experts"), py::arg("tokens_per_expert"), py::arg("wide_counts"), py::arg("tile"),
             py::arg("stream"),
             "Launches out = a @ b.T of block-scaled e4m3 (csrc/fp8/gemm.h) on device pointers, unchecked: "
             "r1.kernels.fp8 is the checked way. RuntimeError where there is no driver or the launch fails.");
  module.def(
      "fp8_quantize", &fp8_quantize, py::kw_only(), py::arg("square"), py::arg("power_of_two"), py::arg("bfloat16"),
      py::arg("batch"), py::arg("rows"), py::arg("columns"), py::arg("x"), py::arg("values"), py::arg("across"),
      py::arg("scales"), py::arg("across_scales"), py::arg("stream"),
      "Launches a quantiser to block-scaled e4m3 (csrc/fp8/quantize.h) on device pointers, unchecked; an address "
      "of 0 for `across` leaves it out.");
  module.def("fp8_shared_bytes", &fp8_shared_bytes, py::arg("rows"), py::arg("columns"), py::arg("square"),
             py::arg("bfloat16"),
             "Shared memory that a block of fp8_gemm's kernel asks for at launch; 0 for a tile that does not exist.");
}
