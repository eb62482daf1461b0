// Exact rectangular assignment by shortest augmenting paths (Jonker and Volgenant 1987, Crouse 2016), for any machine.
//
// Rows are the smaller side and are all matched. The start gives every row its cheapest column if no lower row has the same
// one; in DETR few rows are left after it. Each of those searches for the shortest path to a column without a row. What is
// done to all columns at once is left to `Columns`, so that a CPU spreads it over vector lanes and a GPU over threads;
// both take the same decisions, since each one is the minimum of numbers that are computed alike:
//
//   ties: among equally short paths one that ends at a column without a row goes first, then the lowest column.
//
// Included once per instruction set, after DNDETR_INLINE was defined: what is inlined must be for the same one.

template <class Real>
struct Shortest {
  Real length;
  int column;
};

// Columns offers, for prices that start as the row minima and zero per column:
//   start(rows)          each row's cheapest column, the lowest first; kept where no lower row has it
//   next_unmatched(i)    the next row after i without a column, or at least `rows`
//   restart()            forgets all path lengths
//   relax(i, length)     length[j] = min(length[j], (length - row price i) + cost[i][j] - price[j]) where j is open,
//                        remembering i as the row before j; the shortest of all open columns
//   row_of(j)            the row that has column j, or -1
//   close(j)             takes j out of the search
//   reprice(i, length)   pays for a path from row i of this length
//   augment(i, j)        gives every row on the path from row i to column j the column after it
template <class Columns>
DNDETR_INLINE void solve(Columns& columns, int rows) {
  columns.start(rows);
  for (int first = columns.next_unmatched(-1); first < rows; first = columns.next_unmatched(first)) {
    int row = first;
    Shortest<typename Columns::Real> best{0, 0};
    columns.restart();
    // Every round but the last closes a column that has a row, so there are at most `rows` of them.
    for (int round = 0; round < rows; ++round) {
      best = columns.relax(row, best.length);
      row = columns.row_of(best.column);
      if (row < 0) break;
      columns.close(best.column);
    }
    columns.reprice(first, best.length);
    columns.augment(first, best.column);
  }
}
