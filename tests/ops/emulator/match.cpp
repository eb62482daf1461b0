// The CUDA code of matching, run on the host.
#include "cuda_on_host.h"

#include <string>

#include "match/block.cuh"

using namespace dndetr;
using namespace dndetr::matching;

namespace {

constexpr int kPerLane = 3;

template <int Warps, int Solvers, class Real, class Source>
const char* run(const Source& source, int problems, const MatchOutputs& out, std::int64_t shared_bytes, bool descending) {
  static std::string message;
  // Guarded memory: what lies beyond the shared memory must not change.
  std::vector<double> shared(shared_bytes / sizeof(double) + 64, -7.0);
  std::vector<typename Source::Cost> workspace(std::int64_t(problems) * source.queries() * source.slots());
  emulator::descending = descending;
  emulator::reads_outside = false;
  try {
    emulator::launch(problems, 32 * Warps, [&] {
      match_problem<Warps, Solvers, kPerLane, Real>(source, out, reinterpret_cast<char*>(shared.data()), shared_bytes,
                                                    workspace.data());
    });
    message = emulator::reads_outside ? "a read outside of the inputs, or not aligned" : "";
    for (std::size_t k = (shared_bytes + 7) / 8; k < shared.size(); ++k) {
      if (shared[k] != -7.0) message = "a write outside of shared memory";
    }
  } catch (const std::exception& failure) {
    message = failure.what();
  }
  return message.c_str();
}

// shape: warps of the block (1, 2 or 4), whether all of them search.
template <class Real, class Source>
const char* run(const int* block, const Source& source, int problems, const MatchOutputs& out, std::int64_t shared_bytes) {
  const bool all = block[1] != 0, descending = block[2] != 0;
  if (block[0] == 1) return run<1, 1, Real>(source, problems, out, shared_bytes, descending);
  if (block[0] == 2 && !all) return run<2, 1, Real>(source, problems, out, shared_bytes, descending);
  if (block[0] == 2) return run<2, 2, Real>(source, problems, out, shared_bytes, descending);
  return run<4, 4, Real>(source, problems, out, shared_bytes, descending);
}

void declare_readable(const void* first, std::int64_t bytes) {
  const auto from = reinterpret_cast<std::uintptr_t>(first);
  emulator::readable.emplace_back(from, from + bytes);
}

}  // namespace

// block: warps (1, 2, 4), whether all of them search, whether threads take turns downwards.
extern "C" const char* emulate_assign(const int* block, const void* cost, std::int64_t cost_bytes, int is_double, int exact,
                                      const int* shape, const std::int64_t* strides, const std::int32_t* counts,
                                      std::int32_t* query, std::int64_t shared_bytes) {
  emulator::readable.clear();
  declare_readable(cost, cost_bytes);
  const AssignProblems a{cost,       is_double != 0, shape[0],   shape[1], shape[2],
                         strides[0], strides[1],     strides[2], counts,   query};
  const MatchOutputs out{1, query, nullptr, nullptr};
  if (is_double) return run<double>(block, GivenCosts<double>{a}, shape[0], out, shared_bytes);
  if (exact) return run<double>(block, GivenCosts<float>{a}, shape[0], out, shared_bytes);
  return run<float>(block, GivenCosts<float>{a}, shape[0], out, shared_bytes);
}

// shape: layers, batch, queries, classes, slots, sets; arrays: logits, boxes, target boxes; bytes of each.
extern "C" const char* emulate_match(const int* block, const int* shape, void* const* arrays, const std::int64_t* bytes,
                                     int dtype, const std::int64_t* strides, const std::int64_t* labels,
                                     const std::int32_t* counts, const double* weights, std::int32_t* query,
                                     std::int32_t* target, bool* finite, std::int64_t shared_bytes) {
  emulator::readable.clear();
  for (int k = 0; k < 3; ++k) declare_readable(arrays[k], bytes[k]);
  const Dtype logits = static_cast<Dtype>(dtype), boxes = logits == Dtype::float64 ? logits : Dtype::float32;
  const MatchInputs m{shape[0],
                      shape[1],
                      shape[2],
                      shape[3],
                      shape[4],
                      {arrays[0], logits},
                      {arrays[1], boxes},
                      {strides[0], strides[1], strides[2]},
                      {strides[3], strides[4], strides[5]},
                      labels,
                      {arrays[2], boxes},
                      counts,
                      {weights[0], weights[1], weights[2], weights[3], weights[4]}};
  const MatchOutputs out{shape[5], query, target, finite};
  const int problems = m.layers * m.batch * out.sets;
  if (logits == Dtype::float64) {
    return run<double>(block, ComputedCosts<double>{m, out.sets, m.weights}, problems, out, shared_bytes);
  }
  return run<double>(block, ComputedCosts<float>{m, out.sets, m.weights.as<float>()}, problems, out, shared_bytes);
}
