// Matching of one problem by one block of threads.
//
// All warps fill in the costs, in shared memory where they fit, and find the row minima, a row at a time. What is left is
// searched by one warp, if its lanes can hold all columns in registers, or by all.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "search.cuh"
#include "source.cuh"
#include "common/ops.h"

namespace dndetr::matching {

// Costs beyond it count as not finite, so that no sum of them overflows.
template <class Cost, class Real>
DNDETR_INLINE bool is_sound(Cost c) {
  constexpr double kLargest = sizeof(Real) == 4 ? 1e30 : sizeof(Cost) == 4 ? FLT_MAX : 1e150;
  return fabs(c) <= static_cast<Cost>(kLargest);
}

// All costs, by all warps; whether none had to be replaced by one that is worse than the rest.
template <int Warps, class Source, class Cost, class Real>
DNDETR_INLINE bool fill(const Source& source, const Problem<Cost, Real>& p, Team<Warps>& team) {
  const int lane = team.lane % 32, warp = team.lane / 32;
  bool odd = false;
  Cost worst = static_cast<Cost>(-INFINITY);
  const auto put = [&](int i, int j, Cost c) {
    p.cost[std::int64_t(i) * p.columns + j] = c;
    if (is_sound<Cost, Real>(c)) {
      worst = larger(worst, c);
    } else {
      odd = true;
    }
  };
  // One target at a time: the rows, or the columns where there are more targets than queries.
  source.with_costs([&](const auto& cost) {
    for (int t = warp; t < source.targets; t += Warps) {
      const auto target = source.target(t);
#pragma unroll 4
      for (int q = lane; q < source.queries(); q += 32) put(p.swapped ? q : t, p.swapped ? t : q, cost(target, q));
    }
  });
  if (!__syncthreads_or(odd)) return true;
  worst = -team.least(-worst, 0).length;
  const Cost above = worst + static_cast<Cost>(fabs(worst)) + Cost(1);
  const Cost instead = !(fabs(worst) < INFINITY) ? Cost(1) : fabs(above) < INFINITY ? above : static_cast<Cost>(FLT_MAX);
  for (std::int64_t e = team.lane; e < std::int64_t(p.rows) * p.columns; e += Team<Warps>::kLanes) {
    if (!is_sound<Cost, Real>(p.cost[e])) p.cost[e] = instead;
  }
  __syncthreads();
  return false;
}

// Each row's cheapest column, the lowest first; the lowest of the rows that want a column has it.
template <int Warps, class Cost, class Real>
DNDETR_INLINE void take_minima(const Problem<Cost, Real>& p, int thread) {
  for (int j = thread; j < p.columns; j += 32 * Warps) p.row_of[j] = -1;
  __syncthreads();
  Team<1> warp{thread % 32, nullptr};
  for (int i = thread / 32; i < p.rows; i += Warps) {
    const Cost* const costs = p.row(i);
    Cost low = static_cast<Cost>(INFINITY);
    unsigned where = kAll;
    for (int j = warp.lane; j < p.columns; j += 32) {
      if (costs[j] < low) {
        low = costs[j];
        where = j;
      }
    }
    const Shortest<Cost> best = warp.least(low, where);
    if (warp.lane == 0) {
      p.row_price[i] = best.length;
      p.column_of[i] = best.column;
      atomicMin(reinterpret_cast<unsigned*>(p.row_of + best.column), static_cast<unsigned>(i));  // -1 is the largest
    }
  }
  __syncthreads();
  for (int i = thread; i < p.rows; i += 32 * Warps) {
    if (p.row_of[p.column_of[i]] != i) p.column_of[i] = -1;
  }
  __syncthreads();
}

// Matches problem blockIdx.x: all `Warps` of the block, `Solvers` (1 or all) of them search. `shared` has `bytes`.
template <int Warps, int Solvers, int PerLane, class Real, class Source>
DNDETR_INLINE void match_problem(Source source, const MatchOutputs& out, char* shared, std::int64_t bytes,
                                 typename Source::Cost* workspace) {
  using Cost = typename Source::Cost;
  static_assert(Solvers == 1 || Solvers == Warps);
  const int problem = blockIdx.x, thread = threadIdx.x;
  source.open(problem);
  const int queries = source.queries(), targets = source.targets;
  Problem<Cost, Real> p;
  p.swapped = targets > queries;
  p.rows = p.swapped ? queries : targets;
  p.columns = p.swapped ? targets : queries;
  Team<Warps> all{thread, reinterpret_cast<Candidate*>(shared)};
  char* const state = shared + 2 * Warps * sizeof(Candidate);
  p.row_price = reinterpret_cast<Real*>(state);
  p.column_of = reinterpret_cast<int*>(p.row_price + p.rows);
  p.row_of = p.column_of + p.rows;
  p.before = p.row_of + p.columns;
  char* const rest = state + state_bytes<Real>(p.rows, p.columns);
  const bool fits = rest - shared + std::int64_t(p.rows) * p.columns * std::int64_t(sizeof(Cost)) <= bytes;
  p.cost = fits ? reinterpret_cast<Cost*>(rest) : workspace + std::int64_t(problem) * queries * source.slots();

  bool finite = true;
  if (p.rows > 0) {
    finite = fill(source, p, all);
    take_minima<Warps>(p, thread);
    if (thread < 32 * Solvers) {
      LaneColumns<Cost, Real, Solvers, PerLane> columns{p, {thread, all.exchange}};
      solve(columns, p.rows);
    }
    __syncthreads();
  }

  const int first = problem % out.sets * queries;
  for (int t = thread; t < source.slots(); t += 32 * Warps) {
    const int found = p.rows == 0 || t >= targets ? -1 : p.swapped ? p.row_of[t] : p.column_of[t];
    out.query[std::int64_t(problem) * source.slots() + t] = found < 0 ? -1 : found + first;
  }
  if (out.target == nullptr) return;
  for (int q = thread; q < queries; q += 32 * Warps) {
    out.target[std::int64_t(problem) * queries + q] = p.rows == 0 ? -1 : p.swapped ? p.column_of[q] : p.row_of[q];
  }
  if (thread == 0) out.finite[problem] = finite;
}

}  // namespace dndetr::matching
