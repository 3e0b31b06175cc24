// r1._cuda: what the CUDA runtime says of this machine's devices.
//
// Nothing here may include torch: functions take plain numbers, so that one build serves every torch. The extension
// imports on a machine with no driver, where device_count() is 0 and status() says why.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

void check(cudaError_t error, const char *call) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
  }
}

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
}
