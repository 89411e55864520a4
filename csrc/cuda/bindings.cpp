// The CUDA kernels for Python: raw addresses in, nothing copied; q3mega.ops.backends.cuda knows the
// shapes. A launch that fails raises RuntimeError.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"

namespace py = pybind11;
namespace cuda = q3mega::cuda;
using Address = std::uintptr_t;

namespace {

// What Python passes for a C++ parameter: addresses, streams and enumerations as integers.
template <class T>
using Plain = std::conditional_t<std::is_pointer_v<T>, Address,
                                 std::conditional_t<std::is_enum_v<T>, int, T>>;

template <class T>
T from(const Plain<T>& x) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(x);
  } else {
    return static_cast<T>(x);
  }
}

template <class... Parameters>
void bind(py::module_& m, const char* name, cudaError_t (*launch)(Parameters...)) {
  m.def(name, [=](Plain<Parameters>... arguments) {
    py::gil_scoped_release free;
    const cudaError_t error = launch(from<Parameters>(arguments)...);
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
    }
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels; tensors as addresses of contiguous memory, the stream last.";
  bind(m, "row_stats", cuda::row_stats);
  bind(m, "row_gradient", cuda::row_gradient);
  bind(m, "divergence_sums", cuda::divergence_sums);
  bind(m, "divergence_gradient", cuda::divergence_gradient);
  py::class_<cuda::Attention>(m, "Attention")
      .def(py::init([](int type, int dim, int heads, int kv_heads, int64_t queries, int64_t keys,
                       int chunk, int clamp, float scale, Address cosine, Address sine,
                       Address tile_list, int64_t tiles) {
        const auto *c = from<const float*>(cosine), *s = from<const float*>(sine);
        const auto* w = from<const int*>(tile_list);
        return cuda::Attention{type,  dim,   heads, kv_heads, queries, keys, chunk,
                               clamp, scale, c,     s,        w,       tiles};
      }));
  bind(m, "attention_forward", cuda::attention_forward);
  bind(m, "attention_query_gradient", cuda::attention_query_gradient);
  bind(m, "attention_key_gradient", cuda::attention_key_gradient);
}
