// The columns of one matching problem, held by threads that search for augmenting paths (assign.h) together.
//
// Prices and path lengths are in registers, the matching so far and the rows before columns in shared memory. A minimum over
// lanes is a minimum of unsigned numbers that are ordered as the floats are, then of the columns where it was found: REDUX
// where there is one, and no order of threads that could matter.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>

#include "common/floats.h"
#include "common/lanes.cuh"

#define DNDETR_INLINE __device__ __forceinline__

namespace dndetr::matching {

#include "assign.h"

constexpr unsigned kAll = 0xffffffffu;

// Numbers that compare as floats do; both zeros are one.
__device__ __forceinline__ std::uint32_t ordered(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ std::uint64_t ordered(double x) {
  const std::uint64_t bits = bit_cast<std::uint64_t>(x + 0.0);
  return bits >> 63 ? ~bits : bits | 0x8000000000000000ull;
}
__device__ __forceinline__ float value_of(std::uint32_t key) {
  return bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ double value_of(std::uint64_t key) {
  return bit_cast<double>(key >> 63 ? key & 0x7fffffffffffffffull : ~key);
}

// The smallest key of a warp and the smallest rank that has it.
__device__ __forceinline__ void least_of_warp(std::uint32_t& key, unsigned& rank) {
  const std::uint32_t low = min_of_warp(key);
  rank = min_of_warp(key == low ? rank : kAll);
  key = low;
}
__device__ __forceinline__ void least_of_warp(std::uint64_t& key, unsigned& rank) {
  const auto high = static_cast<std::uint32_t>(key >> 32), low = static_cast<std::uint32_t>(key);
  const std::uint32_t least_high = min_of_warp(high);
  const std::uint32_t least_low = min_of_warp(high == least_high ? low : kAll);
  rank = min_of_warp(high == least_high && low == least_low ? rank : kAll);
  key = std::uint64_t(least_high) << 32 | least_low;
}

struct Candidate {
  std::uint64_t key;
  unsigned rank;
};

// Threads that work together: one warp, or all warps of the block. Each of their minima takes one barrier: they alternate
// between two places to exchange through, so that a thread ahead does not overwrite what others still read.
template <int Warps>
struct Team {
  static constexpr int kLanes = 32 * Warps;
  int lane;
  Candidate* exchange;  // shared, [2 * Warps]
  int turn = 0;

  DNDETR_INLINE void wait() const {
    if constexpr (Warps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // The smallest value of all lanes, and the smallest rank that has it, on every lane.
  template <class Real>
  DNDETR_INLINE Shortest<Real> least(Real value, unsigned rank) {
    auto key = ordered(value);
    least_of_warp(key, rank);
    if constexpr (Warps > 1) {
      Candidate* const place = exchange + turn * Warps;
      if (lane % 32 == 0) place[lane / 32] = {key, rank};
      __syncthreads();
      const Candidate other = place[lane % Warps];
      key = static_cast<decltype(key)>(other.key);
      rank = other.rank;
      least_of_warp(key, rank);
      turn ^= 1;
    }
    return {value_of(key), static_cast<int>(rank)};
  }
};

// One problem in shared memory; costs beyond its size are in a workspace. Rows are the smaller side: targets, or queries
// where there are more targets than those.
template <class Cost, class Real>
struct Problem {
  bool swapped;
  int rows, columns;
  Cost* cost;  // [rows, columns]
  Real* row_price;
  int *column_of, *row_of, *before;

  DNDETR_INLINE const Cost* row(int i) const { return cost + std::int64_t(i) * columns; }
};

// Bytes of a problem besides its costs.
template <class Real>
__host__ __device__ inline std::int64_t state_bytes(int rows, int columns) {
  return rows * std::int64_t(sizeof(Real)) + (rows + 2 * std::int64_t(columns) + 1) / 2 * 2 * sizeof(int);
}

// The columns of a problem, `PerLane` of them in the registers of each thread of a team.
template <class Cost, class RealType, int Warps, int PerLane>
struct LaneColumns {
  using Real = RealType;
  static constexpr int kLanes = Team<Warps>::kLanes;
  static constexpr unsigned kTaken = 1u << 31;  // in a rank: after all columns without a row

  const Problem<Cost, Real>& p;
  Team<Warps> team;
  Real length[PerLane], price[PerLane];
  unsigned closed, taken;  // a bit for each column of the lane

  DNDETR_INLINE int column(int k) const { return team.lane + k * kLanes; }

  DNDETR_INLINE void start(int) {
    taken = 0;
#pragma unroll
    for (int k = 0; k < PerLane; ++k) {
      price[k] = 0;
      if (column(k) < p.columns && p.row_of[column(k)] >= 0) taken |= 1u << k;
    }
  }

  DNDETR_INLINE int next_unmatched(int i) {
    unsigned found = INT_MAX;
    for (int row = i + 1 + team.lane; row < p.rows; row += kLanes) {
      if (p.column_of[row] < 0) {
        found = row;
        break;
      }
    }
    return team.template least<float>(0.0f, found).column;
  }

  DNDETR_INLINE void restart() {
    closed = 0;
#pragma unroll
    for (int k = 0; k < PerLane; ++k) length[k] = static_cast<Real>(INFINITY);
  }

  DNDETR_INLINE Shortest<Real> relax(int i, Real so_far) {
    const Real base = so_far - p.row_price[i];
    const Cost* const costs = p.row(i);
    Real low = static_cast<Real>(INFINITY);
    unsigned rank = kAll;
#pragma unroll
    for (int k = 0; k < PerLane; ++k) {
      const int j = column(k);
      if (j < p.columns && !(closed >> k & 1)) {
        const Real through = base + static_cast<Real>(costs[j]) - price[k];
        if (through < length[k]) {
          length[k] = through;
          p.before[j] = i;
        }
        const unsigned own = j | (taken >> k & 1) * kTaken;
        if (length[k] < low || (length[k] == low && own < rank)) {
          low = length[k];
          rank = own;
        }
      }
    }
    const Shortest<Real> best = team.least(low, rank);
    return {best.length, static_cast<int>(best.column & ~kTaken)};
  }

  DNDETR_INLINE int row_of(int j) const { return p.row_of[j]; }

  DNDETR_INLINE void close(int j) {
    if (j % kLanes == team.lane) closed |= 1u << j / kLanes;
  }

  DNDETR_INLINE void reprice(int first, Real total) {
    team.wait();  // all have read the prices of the last search's rows
    if (team.lane == 0) p.row_price[first] += total;
#pragma unroll
    for (int k = 0; k < PerLane; ++k) {
      if (closed >> k & 1) {
        const Real amount = total - length[k];
        price[k] -= amount;
        p.row_price[p.row_of[column(k)]] += amount;
      }
    }
    team.wait();
  }

  DNDETR_INLINE void augment(int first, int sink) {
    if (team.lane == 0) {
      // A path has every row at most once.
      int j = sink, row = -1;
      for (int step = 0; step < p.rows && row != first; ++step) {
        row = p.before[j];
        const int next = p.column_of[row];
        p.row_of[j] = row;
        p.column_of[row] = j;
        j = next;
      }
    }
    if (sink % kLanes == team.lane) taken |= 1u << sink / kLanes;
    team.wait();
  }
};

}  // namespace dndetr::matching
