// How matrix products are shared out: blocks of rows, panels of columns, threads.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dndetr {

constexpr int kMostRows = 24;      // of a block, so that its part of one factor stays in the second cache
constexpr int kGroupColumns = 64;  // whose products are kept at once, where they are not a result yet

constexpr int rounded_up(int count, int unit) { return (count + unit - 1) / unit * unit; }

// Rows in steps of `unit`, and columns of one panel, that an instruction set takes together.
struct BlockShape {
  int unit, panel;
};

// `count` rows from `first` on (room for `rows` of them), and some panels of columns, `group` of them at a time.
struct Block {
  int rows, first, count, first_panel, last_panel, group;
};

// Whole rows where there are enough of them for all threads, else parts of them.
class Blocks {
 public:
  int rows, panels, group;

  // `columns` are whole panels.
  Blocks(int count, int columns, BlockShape shape, int threads)
      : panels(columns / shape.panel), group(std::max(1, kGroupColumns / shape.panel)), count_(count) {
    const bool few = count < std::int64_t(threads) * kMostRows;
    const int rounds = few ? 1 : threads, blocks = std::max(1, rounded_up(count, kMostRows * rounds) / kMostRows);
    rows = std::max(shape.unit, rounded_up((count + blocks - 1) / blocks, shape.unit));
    blocks_ = rounded_up(count, rows) / rows;
    parts_ = few && blocks_ ? std::min(panels, (threads + blocks_ - 1) / blocks_) : 1;
  }

  int count() const { return blocks_ * parts_; }

  Block operator[](int index) const {
    const int first = index / parts_ * rows, part = index % parts_;
    return {rows, first, std::min(rows, count_ - first), panels * part / parts_, panels * (part + 1) / parts_, group};
  }

 private:
  int count_, blocks_, parts_;
};

// Runs step(index) for all indices below `count`, in a team.
template <class Step>
void for_all(int count, int team, const Step& step) {
#pragma omp parallel for schedule(dynamic) num_threads(team) if (team > 1)
  for (int index = 0; index < count; ++index) step(index);
}

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace dndetr
