// Matching on a GPU: one block for each problem, launched once for all of them.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/cuda_launch.cuh"
#include "block.cuh"

namespace dndetr {
namespace matching {

constexpr int kWarps = 8;
constexpr int kPerLaneOfWarp = 10;   // one warp searches up to 320 columns,
constexpr int kPerLaneOfBlock = 8;   // all eight up to 2048

extern __shared__ __align__(16) char memory[];

template <int Solvers, int PerLane, class Real, class Source>
__global__ __launch_bounds__(32 * kWarps, 2) void match_kernel(Source source, MatchOutputs out, std::int64_t bytes,
                                                            typename Source::Cost* workspace) {
  match_problem<kWarps, Solvers, PerLane, Real>(source, out, memory, bytes, workspace);
}

// Shared memory of a block, in bytes: what the largest problem needs, or all that a block can have.
template <class Cost, class Real>
std::int64_t wanted_bytes(int queries, int slots) {
  return 2 * kWarps * sizeof(Candidate) + state_bytes<Real>(std::min(queries, slots), std::max(queries, slots)) +
         std::int64_t(queries) * slots * sizeof(Cost);
}

template <int Solvers, int PerLane, class Real, class Source>
void launch_kernel(const Launch& launch, int problems, int queries, int slots, const Source& source,
                   const MatchOutputs& out, void* workspace) {
  using Cost = typename Source::Cost;
  const auto kernel = match_kernel<Solvers, PerLane, Real, Source>;
  const std::int64_t bytes = std::min(wanted_bytes<Cost, Real>(queries, slots), launch.most_shared());
  // The limit is the process's, for all threads: only what a launch asks for decides how many blocks run beside each other.
  launch.raise(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(launch.most_shared())));
  kernel<<<problems, 32 * kWarps, bytes, launch.stream()>>>(source, out, bytes, static_cast<Cost*>(workspace));
  launch.check();
}

template <class Real, class Source>
void launch_any(const char* op, int problems, int queries, int slots, const Source& source, const MatchOutputs& out,
                void* workspace, Stream stream) {
  const int columns = std::max(queries, slots);
  if (columns > 32 * kWarps * kPerLaneOfBlock) {
    throw std::invalid_argument(std::string(op) + ": at most 2048 queries and targets on a GPU, got " +
                                std::to_string(columns) + " (backend=\"reference\" takes any number)");
  }
  if (problems == 0) return;
  const Launch launch(op, stream);
  if (columns <= 32 * kPerLaneOfWarp) {
    launch_kernel<1, kPerLaneOfWarp, Real>(launch, problems, queries, slots, source, out, workspace);
  } else {
    launch_kernel<kWarps, kPerLaneOfBlock, Real>(launch, problems, queries, slots, source, out, workspace);
  }
}

}  // namespace matching

using namespace matching;

std::int64_t match_workspace(int queries, int slots, bool is_double, Stream stream) {
  const Launch launch("match", stream);
  const std::int64_t bytes =
      is_double ? wanted_bytes<double, double>(queries, slots) : wanted_bytes<float, double>(queries, slots);
  return bytes > launch.most_shared() ? std::int64_t(queries) * slots : 0;
}

void assign_cuda(const AssignProblems& a, bool exact, void* workspace, Stream stream) {
  const MatchOutputs out{1, a.query_of, nullptr, nullptr};
  if (a.is_double) {
    launch_any<double>("assign", a.problems, a.queries, a.targets, GivenCosts<double>{a}, out, workspace, stream);
  } else if (exact) {
    launch_any<double>("assign", a.problems, a.queries, a.targets, GivenCosts<float>{a}, out, workspace, stream);
  } else {
    launch_any<float>("assign", a.problems, a.queries, a.targets, GivenCosts<float>{a}, out, workspace, stream);
  }
}

void match_cuda(const MatchInputs& m, const MatchOutputs& out, bool exact, void* workspace, Stream stream) {
  const int problems = m.layers * m.batch * out.sets, queries = m.queries / out.sets;
  const auto run = [&](auto cost, auto real) {
    using Cost = decltype(cost);
    const ComputedCosts<Cost> source{m, out.sets, m.weights.template as<Cost>()};
    launch_any<decltype(real)>("match", problems, queries, m.slots, source, out, workspace, stream);
  };
  if (m.logits.dtype == Dtype::float64) {
    run(double(), double());
  } else if (exact) {
    run(float(), double());
  } else {
    run(float(), float());
  }
}

}  // namespace dndetr
