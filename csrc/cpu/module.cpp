// r1._cpu: the kernels of csrc/cpu for tensors on a CPU, by address. It includes no torch and imports without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace {

using r1::cpu::Kernels;

// What this processor can run, the best last.
std::vector<std::pair<std::string, const Kernels *>> available() {
  std::vector<std::pair<std::string, const Kernels *>> found{{"baseline", &r1::cpu::baseline}};
#ifdef R1_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    found.emplace_back("avx2", &r1::cpu::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq"))
      found.emplace_back("avx512", &r1::cpu::avx512);
  }
#endif
  return found;
}

const Kernels *in_use = available().back().second;

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto &[name, kernels] : available()) names.push_back(name);
  return names;
}

void use(const std::string &name) {
  std::string names;
  for (const auto &[known, kernels] : available()) {
    if (known == name) {
      in_use = kernels;
      return;
    }
    names += (names.empty() ? "" : ", ") + known;
  }
  throw py::value_error("name is '" + name + "', wanted one of " + names);
}

// A pointer comes as its address, 0 for null.
template <class T>
using Passed = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <class T>
T taken(Passed<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

template <class Result, class... Arguments>
void define(py::module_ &m, const char *name, Result (*Kernels::*kernel)(Arguments...)) {
  m.def(
      name, [kernel](Passed<Arguments>... arguments) { return (in_use->*kernel)(taken<Arguments>(arguments)...); },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("instruction_sets", &instruction_sets, "What this processor can run, the best, which is used, last.");
  m.def("use", &use, py::arg("name"), "Use the kernels for this instruction set.");
  define(m, "rms_norm", &Kernels::rms_norm);
  define(m, "rms_norm_backward", &Kernels::rms_norm_backward);
  define(m, "apply_rope", &Kernels::apply_rope);
  define(m, "route", &Kernels::route);
  define(m, "route_backward", &Kernels::route_backward);
  define(m, "sort_by_expert", &Kernels::sort_by_expert);
  define(m, "experts_forward", &Kernels::experts_forward);
  define(m, "experts_backward", &Kernels::experts_backward);
  define(m, "sum_pairs", &Kernels::sum_pairs);
  define(m, "swiglu", &Kernels::swiglu);
  define(m, "swiglu_backward", &Kernels::swiglu_backward);
  define(m, "attention", &Kernels::attention);
  define(m, "attention_backward", &Kernels::attention_backward);
  define(m, "decode", &Kernels::decode);
  define(m, "append", &Kernels::append);
}
