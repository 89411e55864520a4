// Data indices that Python loops are too slow for: best-fit packing and blending of datasets.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

// Without forcecast: a length of 1.5 is a TypeError, not silently 1.
using Lengths = py::array_t<std::int64_t, py::array::c_style>;
using Weights = py::array_t<double, py::array::c_style>;

// Best-fit decreasing: the longest sequence first, each into the fullest bin that still takes it.
// O(n log n); equal lengths keep their order, so the result is a function of the input alone.
std::vector<std::vector<std::int64_t>> PackIndices(const std::int64_t* lengths, std::int64_t n,
                                                   std::int64_t capacity) {
  std::vector<std::int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return lengths[a] > lengths[b]; });
  std::vector<std::vector<std::int64_t>> bins;
  std::set<std::pair<std::int64_t, std::int64_t>> room;  // (free tokens, bin)
  for (const std::int64_t i : order) {
    const std::int64_t need = lengths[i];
    auto fit = room.lower_bound({need, 0});
    std::int64_t bin = static_cast<std::int64_t>(bins.size());
    std::int64_t left = capacity - need;
    if (fit == room.end()) {
      bins.emplace_back();
    } else {
      bin = fit->second;
      left = fit->first - need;
      room.erase(fit);
    }
    bins[bin].push_back(i);
    if (left > 0) room.insert({left, bin});
  }
  return bins;
}

py::list BestFitPack(const Lengths& lengths, std::int64_t capacity) {
  const std::int64_t n = lengths.size();
  const std::int64_t* data = lengths.data();
  for (std::int64_t i = 0; i < n; ++i) {
    if (data[i] < 1 || data[i] > capacity) {
      throw std::invalid_argument("lengths[" + std::to_string(i) + "]=" + std::to_string(data[i]) +
                                  " must lie in 1..capacity=" + std::to_string(capacity));
    }
  }
  std::vector<std::vector<std::int64_t>> bins;
  {
    py::gil_scoped_release release;
    bins = PackIndices(data, n, capacity);
  }
  py::list out;
  for (const auto& bin : bins) {
    out.append(py::array_t<std::int64_t>(static_cast<py::ssize_t>(bin.size()), bin.data()));
  }
  return out;
}

// At each place, the dataset that lags its share the most (the first of equals), so that every
// prefix follows the weights closely.
py::tuple BlendIndex(const Weights& weights, std::int64_t n) {
  const std::int64_t k = weights.size();
  const double* w = weights.data();
  if (n < 0) throw std::invalid_argument("n=" + std::to_string(n) + " must be at least 0");
  double sum = 0;
  for (std::int64_t d = 0; d < k; ++d) {
    if (!(w[d] >= 0)) {
      throw std::invalid_argument("weights[" + std::to_string(d) + "]=" + std::to_string(w[d]) +
                                  " must not be negative");
    }
    sum += w[d];
  }
  if (!(sum > 0 && std::isfinite(sum))) {
    throw std::invalid_argument("weights must have a positive, finite sum");
  }
  std::vector<double> share(w, w + k);
  for (double& s : share) s /= sum;
  py::array_t<std::int32_t> dataset(n);
  py::array_t<std::int64_t> sample(n);
  std::int32_t* out_dataset = dataset.mutable_data();
  std::int64_t* out_sample = sample.mutable_data();
  {
    py::gil_scoped_release release;
    std::vector<std::int64_t> count(k, 0);
    for (std::int64_t i = 0; i < n; ++i) {
      std::int64_t best = -1;
      double lag = 0;
      for (std::int64_t d = 0; d < k; ++d) {
        const double behind = share[d] * static_cast<double>(i + 1) - static_cast<double>(count[d]);
        if (share[d] > 0 && (best < 0 || behind > lag)) {
          best = d;
          lag = behind;
        }
      }
      out_dataset[i] = static_cast<std::int32_t>(best);
      out_sample[i] = count[best]++;
    }
  }
  return py::make_tuple(dataset, sample);
}

}  // namespace

PYBIND11_MODULE(_data, m) {
  m.doc() = "Data indices in C++: best-fit packing and blending.";
  m.def("best_fit_pack", &BestFitPack, py::arg("lengths"), py::arg("capacity"),
        R"(Pack sequences into as few bins as best-fit decreasing needs.

lengths (n,) int64, tokens. Returns a list of bins, each an int64 array of indices into lengths
whose lengths sum to at most capacity; the same input gives the same bins.
Raises ValueError for a length below 1 or above capacity.)");
  m.def("blend_index", &BlendIndex, py::arg("weights"), py::arg("n"),
        R"(Interleave datasets by weight.

weights (datasets,) float64. Returns (dataset (n,) int32, sample (n,) int64): place i of the blend
is sample number sample[i] of dataset number dataset[i].
Raises ValueError for n < 0, a negative weight, or a sum that is not positive and finite.)");
}
