// The CPU kernels for Python: raw addresses in, nothing copied; q3mega.ops.backends.cpu knows
// the shapes.
#include <pybind11/pybind11.h>

#include "cpu/distill_loss.h"
#include "cpu/dual_chunk_attention.h"
#include "cpu/linear_logprob.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (sequences, heads, kv_heads, dim, cu_q, cu_k, q_offset, chunk, clamp, cosine, sine, scale), then
// the operands of one of the two.
using Sizes = int64_t;
#define Q3MEGA_DUAL_CHUNK                                                              \
  Sizes sequences, Sizes heads, Sizes kv_heads, Sizes dim, Address cu_q, Address cu_k, \
      Sizes q_offset, Sizes chunk, Sizes clamp, Address cosine, Address sine, float scale

#define Q3MEGA_SHAPE                                                                             \
  q3mega::DualChunk {                                                                            \
    sequences, heads, kv_heads, dim, at<const int64_t>(cu_q), at<const int64_t>(cu_k), q_offset, \
        chunk, clamp, at<const float>(cosine), at<const float>(sine), scale                      \
  }

}  // namespace

PYBIND11_MODULE(Q3MEGA_MODULE, m) {
  m.doc() = "Row kernels of the lm-head losses; tensors as addresses of contiguous memory.";
  m.def("row_stats", [](Address logits, int64_t rows, int64_t stride, int64_t columns,
                        Address column, Address stats) {
    py::gil_scoped_release free;
    q3mega::row_stats(at<const float>(logits), rows, stride, columns, at<const int64_t>(column),
                      at<float>(stats));
  });
  m.def("row_gradient",
        [](Address logits, int64_t rows, int64_t stride, int64_t columns, Address column,
           Address lse, Address entropy, Address g_logprob, Address g_entropy) {
          py::gil_scoped_release free;
          q3mega::row_gradient(at<float>(logits), rows, stride, columns, at<const int64_t>(column),
                               at<const float>(lse), at<const float>(entropy),
                               at<const float>(g_logprob), at<const float>(g_entropy));
        });
  m.def("divergence_sums", [](Address student, Address teacher, int64_t rows, int64_t stride,
                              int64_t columns, Address lse_student, Address lse_teacher,
                              int64_t kind, float beta, Address sums) {
    py::gil_scoped_release free;
    q3mega::divergence_sums(at<const float>(student), at<float>(teacher), rows, stride, columns,
                            at<const float>(lse_student), at<const float>(lse_teacher),
                            static_cast<q3mega::Divergence>(kind), beta, at<float>(sums));
  });
  m.def("divergence_gradient", [](Address student, Address teacher, int64_t rows, int64_t stride,
                                  int64_t columns, Address lse_student, Address lse_teacher,
                                  int64_t kind, float beta, Address student_part, Address g) {
    py::gil_scoped_release free;
    q3mega::divergence_gradient(at<float>(student), at<const float>(teacher), rows, stride, columns,
                                at<const float>(lse_student), at<const float>(lse_teacher),
                                static_cast<q3mega::Divergence>(kind), beta,
                                at<const float>(student_part), at<const float>(g));
  });
  m.def("picked_logits", [](Address hidden, Address weight, Address picked, int64_t rows,
                            int64_t picks, int64_t width, Address logits) {
    py::gil_scoped_release free;
    q3mega::picked_logits(at<const float>(hidden), at<const float>(weight),
                          at<const int64_t>(picked), rows, picks, width, at<float>(logits));
  });
  m.def("picked_d_hidden", [](Address dz, Address weight, Address picked, int64_t rows,
                              int64_t picks, int64_t width, Address d_hidden) {
    py::gil_scoped_release free;
    q3mega::picked_d_hidden(at<const float>(dz), at<const float>(weight), at<const int64_t>(picked),
                            rows, picks, width, at<float>(d_hidden));
  });
  m.def("picked_d_weight", [](Address dz, Address hidden, Address picked, int64_t rows,
                              int64_t picks, int64_t width, Address d_weight) {
    py::gil_scoped_release free;
    q3mega::picked_d_weight(at<const float>(dz), at<const float>(hidden), at<const int64_t>(picked),
                            rows, picks, width, at<float>(d_weight));
  });
  m.def("dual_chunk_forward",
        [](Q3MEGA_DUAL_CHUNK, Address q, Address k, Address v, Address out, Address lse) {
          py::gil_scoped_release free;
          q3mega::dual_chunk_forward(Q3MEGA_SHAPE, at<const float>(q), at<const float>(k),
                                     at<const float>(v), at<float>(out), at<float>(lse));
        });
  m.def("dual_chunk_backward",
        [](Q3MEGA_DUAL_CHUNK, Address q, Address k, Address v, Address out, Address lse,
           Address d_out, Address d_q, Address d_k, Address d_v) {
          py::gil_scoped_release free;
          q3mega::dual_chunk_backward(Q3MEGA_SHAPE, at<const float>(q), at<const float>(k),
                                      at<const float>(v), at<const float>(out),
                                      at<const float>(lse), at<const float>(d_out), at<float>(d_q),
                                      at<float>(d_k), at<float>(d_v));
        });
}
