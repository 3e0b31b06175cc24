// What every launch needs of the CUDA runtime.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace r1 {

inline void check(cudaError_t error, const char *call) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // said here, not to whoever calls next
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
  }
}

inline void check(CUresult result, const char *call) {
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(call) + ": CUDA driver error " + std::to_string(result));
  }
}

inline int attribute_of_current_device(cudaDeviceAttr name) {
  int index = 0, value = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, name, index), "cudaDeviceGetAttribute");
  return value;
}

// libcuda is not linked, so that the extension imports where there is no driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

}  // namespace r1
