// Exact rectangular assignment by shortest augmenting paths (Jonker and Volgenant 1987, Crouse 2016), for any machine.
//
// Rows are the smaller side and are all matched. The control flow is here; what is done to all columns at once is left to
// `Columns`, so that a CPU spreads it over vector lanes and a GPU over threads. The start is each row's minimum, kept where
// its column is still free; in DETR few rows are left after it. Among equally short paths the search ends at a free column
// if there is one, the lowest first.
#pragma once

#if defined(__CUDACC__)
#define DNDETR_INLINE __device__ __forceinline__
#else
#define DNDETR_INLINE inline __attribute__((always_inline))
#endif

namespace dndetr {

template <class Real>
struct Shortest {
  Real length;
  int column;
};

// What one problem needs besides its columns. The caller provides the memory: `row_price` and `column_of` hold `rows`
// entries, `row_of` one per column (all -1 at the start), `closed`, `length` and `contested` hold `rows`.
template <class Real>
struct Search {
  Real* row_price;
  int* column_of;
  int* row_of;
  int* closed;
  Real* length;
  int* contested;
};

// Columns offers, over all columns j of cost row i:
//   smallest(i)          the smallest cost[i][j], lowest j first
//   restart()            forget all path lengths
//   relax(i, base)       length[j] = min(length[j], base + cost[i][j] - price[j]) where j is open, remembering i as the
//                        row before j; returns the shortest, lowest j first
//   take(j)              notes that j has a row from now on
//   find_free(length)    the lowest column without a row at exactly this length, or -1
//   before(j)            the row before j
//   close(j)             takes j out of the search
//   reopen(j, amount)    puts j back and lowers its price by amount
template <class Real, class Columns>
DNDETR_INLINE void solve(Columns& columns, int rows, const Search<Real>& s) {
  int contests = 0;
  for (int i = 0; i < rows; ++i) {
    const Shortest<Real> best = columns.smallest(i);
    s.row_price[i] = best.length;
    if (s.row_of[best.column] < 0) {
      s.row_of[best.column] = i;
      s.column_of[i] = best.column;
      columns.take(best.column);
    } else {
      s.contested[contests++] = i;
    }
  }
  for (int k = 0; k < contests; ++k) {
    const int start = s.contested[k];
    int i = start, sink, visited = 0;
    Real length = 0;
    columns.restart();
    for (;;) {
      const Shortest<Real> best = columns.relax(i, length - s.row_price[i]);
      length = best.length;
      sink = best.column;
      if (s.row_of[sink] < 0) break;
      const int free = columns.find_free(length);
      if (free >= 0) {
        sink = free;
        break;
      }
      columns.close(sink);
      s.closed[visited] = sink;
      s.length[visited++] = length;
      i = s.row_of[sink];
    }
    s.row_price[start] += length;
    for (int v = 0; v < visited; ++v) {
      const Real amount = length - s.length[v];
      s.row_price[s.row_of[s.closed[v]]] += amount;
      columns.reopen(s.closed[v], amount);
    }
    for (int j = sink; j >= 0;) {
      const int row = columns.before(j);
      s.row_of[j] = row;
      const int next = row == start ? -1 : s.column_of[row];
      s.column_of[row] = j;
      j = next;
    }
    columns.take(sink);
  }
}

}  // namespace dndetr
