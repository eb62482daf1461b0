// dndetr._C: Python names for the launchers. Pointers arrive as integers (tensor.data_ptr()), the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "ops.h"

namespace py = pybind11;

namespace {

constexpr std::array<const char*, 3> kSimdNames = {"plain", "avx2", "avx512"};

dndetr::Simd simd_named(const std::string& name) {
  if (name.empty()) return dndetr::best_simd();
  for (std::size_t k = 0; k < kSimdNames.size(); ++k) {
    if (name == kSimdNames[k]) return static_cast<dndetr::Simd>(k);
  }
  throw py::value_error("unknown instruction set '" + name + "', choose one of plain, avx2, avx512");
}

void assign(std::uintptr_t cost, bool is_double, std::array<int, 3> shape, std::array<std::int64_t, 3> strides,
            std::uintptr_t counts, std::uintptr_t query_of, int threads, const std::string& simd) {
  const dndetr::AssignProblems problems{
      reinterpret_cast<const void*>(cost),       is_double,  shape[0],   shape[1],
      shape[2],                                  strides[0], strides[1], strides[2],
      reinterpret_cast<const std::int32_t*>(counts), reinterpret_cast<std::int32_t*>(query_of)};
  const dndetr::Simd chosen = simd_named(simd);
  py::gil_scoped_release release;
  dndetr::assign(problems, threads, chosen);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of dndetr: raw pointers in, no torch inside.";
  m.def("simd", [] { return kSimdNames[static_cast<std::size_t>(dndetr::best_simd())]; },
        "Name of the widest instruction set used on this machine.");
  m.def("assign", &assign, py::arg("cost"), py::arg("is_double"), py::arg("shape"), py::arg("strides"), py::arg("counts"),
        py::arg("query_of"), py::arg("threads") = 1, py::arg("simd") = "",
        "Exact assignment of every problem: cost [M, N, T] at any strides, counts [M] int32 -> query_of [M, T] int32.");
}
