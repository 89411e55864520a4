// The CPU kernels for Python: raw addresses in, nothing copied; q3mega.ops.cpu knows the shapes.
#include <pybind11/pybind11.h>

#include "cpu/distill_loss.h"
#include "cpu/linear_logprob.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Row kernels of the lm-head losses; tensors as addresses of contiguous memory.";
    m.def("row_stats", [](Address logits, int64_t rows, int64_t stride, int64_t columns,
                          Address column, Address stats) {
        py::gil_scoped_release free;
        q3mega::row_stats(at<const float>(logits), rows, stride, columns, at<const int64_t>(column),
                          at<float>(stats));
    });
    m.def("row_gradient", [](Address logits, int64_t rows, int64_t stride, int64_t columns,
                             Address column, Address lse, Address entropy, Address g_logprob,
                             Address g_entropy) {
        py::gil_scoped_release free;
        q3mega::row_gradient(at<float>(logits), rows, stride, columns, at<const int64_t>(column),
                             at<const float>(lse), at<const float>(entropy),
                             at<const float>(g_logprob), at<const float>(g_entropy));
    });
    m.def("divergence_sums", [](Address student, Address teacher, int64_t rows, int64_t stride,
                                int64_t columns, Address lse_student, Address lse_teacher,
                                int64_t kind, float beta, Address sums) {
        py::gil_scoped_release free;
        q3mega::divergence_sums(at<const float>(student), at<const float>(teacher), rows, stride,
                                columns, at<const float>(lse_student), at<const float>(lse_teacher),
                                static_cast<q3mega::Divergence>(kind), beta, at<float>(sums));
    });
    m.def("divergence_gradient", [](Address student, Address teacher, int64_t rows, int64_t stride,
                                    int64_t columns, Address lse_student, Address lse_teacher,
                                    int64_t kind, float beta, Address own, Address g) {
        py::gil_scoped_release free;
        q3mega::divergence_gradient(at<float>(student), at<const float>(teacher), rows, stride,
                                    columns, at<const float>(lse_student),
                                    at<const float>(lse_teacher),
                                    static_cast<q3mega::Divergence>(kind), beta,
                                    at<const float>(own), at<const float>(g));
    });
}
