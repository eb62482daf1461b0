// Attention of one image and head, on one instruction set; formulas are in dndetr/ops/group_attention.py.
//
// Included once per instruction set, as vectors.h says. A tile's queries lie in memory as columns, and a panel's keys too,
// so that scores are sums of outer products. Forwards each tile goes past its panels, a chunk of them at a time, with a
// running maximum. Backwards each panel goes past the tiles that see it, in their order: sums do not depend on threads.

#include "common/vectors.h"

#include "common/vector_math.h"

#include "products.h"

// Widths of queries and keys, and of values: as they are, in whole registers, and in whole blocks of a gradient's channels.
struct Widths {
  int qk, v, qk_row, v_row, qk_columns, v_columns;

  template <class Real>
  static DNDETR_KERNEL Widths of(const Attention& p) {
    const int qk = p.widths[0] + p.widths[1], v = p.value_width;
    return {qk, v, whole(qk, kLanes<Real>), whole(v, kLanes<Real>), whole(qk, kDepth), whole(v, kDepth)};
  }
};

template <class Real>
struct Forward {
  Widths w;
  const Real *keys, *values;  // [panel, qk, kPanel], [key, v_row]
  Real* query;                // [qk_columns, kTile]
  Real* scores;               // [kChunk, height, kPanel]
  Real* out;                  // [height, v_row], not divided by sum yet
  Real top[kRows], sum[kRows];
};

// All channels of a product, two registers at a time.
template <int R, class Real>
DNDETR_KERNEL void mix_all(const Real* weights, const Real* rows, int stride, int count, Real* to) {
  for (int d = 0; d < stride; d += kPanel<Real>) {
    stride - d > kLanes<Real> ? mix<R, 2>(weights, rows + d, stride, count, to + d)
                              : mix<R, 1>(weights, rows + d, stride, count, to + d);
  }
}

// One tile past the panels that it sees.
template <int R, class Real>
DNDETR_TARGET void attend(const Plan& plan, const Tile& tile, Forward<Real>& f) {
  if constexpr (R > 2) {
    if (tile.height < R) return attend<R - 2>(plan, tile, f);
  }
  const int panels = plan.panels_of(tile);
  Reals<Real> sum[R] = {};
  Real kept[R] = {}, shift[R];
  std::fill_n(f.top, R, -kInfinity<Real>);
  std::fill_n(f.out, R * f.w.v_row, Real(0));
  for (int first = 0; first < panels; first += kChunk) {
    const int last = std::min(panels, first + kChunk);
    Reals<Real> high[R];
    for (int r = 0; r < R; ++r) high[r] = Reals<Real>{} - kInfinity<Real>;
    Real* x = f.scores;
    for (int k = first; k < last; ++k) {
      const int panel = plan.panel_of(tile, k), count = plan.panels[panel].count;
      const Real* keys = f.keys + std::int64_t(panel) * f.w.qk * kPanel<Real>;
      count > kLanes<Real> ? score<R, 2>(f.query, keys, f.w.qk, x) : score<R, 1>(f.query, keys, f.w.qk, x);
      const int n = count > kLanes<Real> ? kLanes<Real> : 0;  // where the last register begins
      const Indices<Real> beyond = lane_numbers<Real>() >= count - n;
      for (int r = 0; r < R; ++r, x += kPanel<Real>) {
        const Reals<Real> tail = at(x + n) = beyond ? Reals<Real>{} - kInfinity<Real> : at(x + n);
        high[r] = at(x) > high[r] ? at(x) : high[r];
        high[r] = tail > high[r] ? tail : high[r];
      }
    }
    for (int r = 0; r < R; ++r) {
      const Real before = f.top[r];
      f.top[r] = std::max(before, fold<Highest, Real>(high[r]));
      shift[r] = f.top[r] == -kInfinity<Real> ? Real(0) : f.top[r];  // -inf - -inf would be NaN
      if (first > 0) {
        kept[r] = exp_of(Reals<Real>{} + (before - shift[r]))[0];
        sum[r] *= kept[r];
      }
    }
    for (int r = 0; first > 0 && r < R; ++r) {
      for (int d = 0; d < f.w.v_row; d += kLanes<Real>) at(f.out + r * f.w.v_row + d) *= kept[r];
    }
    x = f.scores;
    for (int k = first; k < last; ++k) {
      const Panel& panel = plan.panels[plan.panel_of(tile, k)];
      const Real *const weights = x, *const values = f.values + std::int64_t(panel.first) * f.w.v_row;
      for (int r = 0; r < R; ++r, x += kPanel<Real>) {
        sum[r] += at(x) = exp_of(at(x) - shift[r]);
        if (panel.count > kLanes<Real>) sum[r] += at(x + kLanes<Real>) = exp_of(at(x + kLanes<Real>) - shift[r]);
      }
      mix_all<R>(weights, values, f.w.v_row, panel.count, f.out);
    }
  }
  for (int r = 0; r < R; ++r) f.sum[r] = fold<Sum, Real>(sum[r]);
}

// A tile's rows of an array -> columns, zero beyond them; `staged` has whole registers.
template <class Real, class Parts, class PartWidths>
DNDETR_KERNEL void load_tile(const Tile& tile, const Parts& x, int b, int head, const PartWidths& widths, int width,
                             int columns, Real* staged, Real* to) {
  const int stride = whole(width, kLanes<Real>);
  for (int r = 0; r < tile.rows; ++r) load_row(x, b, head, tile.query + r, widths, staged + r * stride);
  transpose(staged, stride, tile.rows, width, columns, to, kTile<Real>);
  for (int r = whole(tile.rows, kLanes<Real>); r < kTile<Real>; r += kLanes<Real>) {
    for (int d = 0; d < columns; ++d) at(to + d * kTile<Real> + r) = Reals<Real>{};
  }
}
template <class Real>
DNDETR_KERNEL void load_queries(const Attention& p, const Widths& w, const Tile& tile, int b, int head, Real* staged,
                                Real* to) {
  load_tile(tile, p.q, b, head, p.widths, w.qk, w.qk_columns, staged, to);
  for (int i = 0; i < w.qk_columns * kTile<Real>; i += kLanes<Real>) at(to + i) *= Real(p.scale);
}

// A panel's rows of an array -> rows `stride` long, and columns; of a panel half full the second register stays as it is.
template <class Real, class Parts, class PartWidths>
DNDETR_KERNEL void load_panel(const Plan& plan, const Panel& panel, const Parts& x, int b, int head,
                              const PartWidths& widths, int width, int stride, Real* rows, Real* to) {
  for (int j = 0; j < panel.count; ++j) load_row(x, b, head, plan.keys[panel.first + j], widths, rows + j * stride);
  transpose(rows, stride, panel.count, width, width, to, kPanel<Real>);
}

// The tiles of part `part` of `parts`.
template <class Real>
DNDETR_TARGET void forward(const Attention& p, const Heads& out, void* lse, int b, int head, int part, int parts,
                           Memory& memory) {
  const Plan plan(p, b, kRows, kPanel<Real>);
  const std::int64_t panels = plan.panels.size(), keys = plan.keys.size(), tiles = plan.tiles.size();
  Forward<Real> f;
  const Widths& w = f.w = Widths::of<Real>(p);
  auto take = memory.room<Real>(panels * w.qk * kPanel<Real> + keys * w.v_row +
                                kPanel<Real> * (w.qk_row + w.v_row + kRows * kChunk) + kRows * (w.v_row + w.qk_row) +
                                kTile<Real> * w.qk_columns);
  Real* const columns = take(panels * w.qk * kPanel<Real>);
  Real* const values = take(keys * w.v_row);
  Real* const rows = take(kPanel<Real> * w.qk_row);
  f.keys = columns, f.values = values;
  f.scores = take(kChunk * kRows * kPanel<Real>);
  f.out = take(kRows * w.v_row);
  f.query = take(kTile<Real> * w.qk_columns);
  Real* const staged = take(kRows * w.qk_row);
  for (std::int64_t k = 0; k < panels; ++k) {
    load_panel(plan, plan.panels[k], p.k, b, head, p.widths, w.qk, w.qk_row, rows, columns + k * w.qk * kPanel<Real>);
  }
  std::fill_n(values, keys * w.v_row, Real(0));
  for (std::int64_t j = 0; j < keys; ++j) load_row(p.v, b, head, plan.keys[j], w.v, values + j * w.v_row);

  Real* const lse_row = static_cast<Real*>(lse) + (std::int64_t(b) * p.heads + head) * p.queries;
  for (std::int64_t n = tiles * part / parts; n < tiles * (part + 1) / parts; ++n) {
    const Tile& tile = plan.tiles[n];
    load_queries(p, w, tile, b, head, staged, f.query);
    attend<kRows>(plan, tile, f);
    const bool blind = plan.panels_of(tile) == 0;
    for (int r = 0; r < tile.rows; ++r) {
      Real* const row = f.out + r * w.v_row;
      for (int d = 0; d < w.v; ++d) row[d] = blind ? Real(0) : row[d] / f.sum[r];
      store_row(row, w.v, out, b, head, tile.query + r);
      lse_row[tile.query + r] = blind ? kInfinity<Real> : f.top[r] + std::log(f.sum[r]);
    }
  }
  if (part > 0) return;
  std::fill_n(f.out, w.v_row, Real(0));
  for (int q = 0; q < p.groups * p.slots; ++q) {
    if (q % p.slots < plan.live) continue;
    store_row(f.out, w.v, out, b, head, q);
    lse_row[q] = kInfinity<Real>;
  }
}

// What one panel and one tile have; gradients of keys and values are columns as they are.
template <class Real>
struct Backward {
  Widths w;
  int count;                          // of the panel's keys
  const Real *keys, *key_rows;        // [qk, kPanel], [kPanel, qk_row]
  const Real* values;                 // [v, kPanel]
  const Real *query, *grad_out;       // [qk_columns, kTile], [v_columns, kTile]
  const Real *lse, *delta;            // [height]
  Real *weights, *slopes;             // [height, kPanel]
  Real *grad_keys, *grad_values;      // [qk_columns, kPanel], [v_columns, kPanel]
  Real* grad_query;                   // [height, qk_row], not scaled yet
};

// N registers of keys of one panel, for one tile.
template <int R, int N, class Real>
DNDETR_TARGET void differentiate(const Backward<Real>& g) {
  score<R, N>(g.query, g.keys, g.w.qk, g.weights);
  score<R, N>(g.grad_out, g.values, g.w.v, g.slopes);
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      const int place = r * kPanel<Real> + n * kLanes<Real>;
      const Reals<Real> weight = at(g.weights + place) = exp_of(at(g.weights + place) - g.lse[r]);
      at(g.slopes + place) = weight * (at(g.slopes + place) - g.delta[r]);
    }
  }
  spread<R, N>(g.grad_out, g.w.v_columns, g.weights, g.grad_values);
  spread<R, N>(g.query, g.w.qk_columns, g.slopes, g.grad_keys);
  mix_all<R>(g.slopes, g.key_rows, g.w.qk_row, g.count, g.grad_query);
}

template <int R, class Real>
DNDETR_KERNEL void differentiate(int height, const Backward<Real>& g) {
  if constexpr (R > 2) {
    if (height < R) return differentiate<R - 2>(height, g);
  }
  if (g.count > kLanes<Real>) {
    differentiate<R, 2>(g);
  } else {
    differentiate<R, 1>(g);
  }
}

// Zeros for the rows of keys that nobody sees; `seen` in order.
template <class Real>
DNDETR_KERNEL void clear_others(const Attention& p, const Plan& plan, const AttentionGrads& grads, int b, int head,
                                const Real* zeros) {
  auto seen = plan.keys.begin();
  for (int j = 0; j < p.keys; ++j) {
    if (seen != plan.keys.end() && *seen == j) {
      ++seen;
      continue;
    }
    store_row(zeros, p.widths, grads.k, b, head, j);
    store_row(zeros, p.value_width, grads.v, b, head, j);
  }
  for (int q = 0; q < p.groups * p.slots; ++q) {
    if (q % p.slots >= plan.live) store_row(zeros, p.widths, grads.q, b, head, q);
  }
}

template <class Real>
DNDETR_TARGET void backward(const Attention& p, const Heads& grad_out, const Heads& out, const void* lse,
                            const AttentionGrads& grads, int b, int head, Memory& memory) {
  const Plan plan(p, b, kRows, kPanel<Real>);
  const int tiles = static_cast<int>(plan.tiles.size());
  Backward<Real> g;
  const Widths& w = g.w = Widths::of<Real>(p);
  const int longest = whole(std::max(w.qk_columns, w.v_columns), kLanes<Real>);
  const std::int64_t rows = whole(plan.height, kLanes<Real>), padded = std::int64_t(tiles) * kTile<Real>;
  auto take = memory.room<Real>(padded * (w.qk_columns + w.v_columns + 2) + rows * w.qk_row +
                                kPanel<Real> * (2 * w.qk_columns + 2 * w.v_columns + w.qk_row + 2 * kRows) +
                                std::max(kPanel<Real>, kRows) * longest + kTile<Real> * w.v_columns);
  Real* const query = take(padded * w.qk_columns);
  Real* const grad = take(padded * w.v_columns);
  Real* const lse_of = take(padded);
  Real* const delta = take(padded);
  Real* const grad_query = take(rows * w.qk_row);
  Real* const keys = take(kPanel<Real> * w.qk_columns);
  Real* const values = take(kPanel<Real> * w.v_columns);
  Real* const key_rows = take(kPanel<Real> * w.qk_row);
  Real* const staged = take(std::max(kPanel<Real>, kRows) * longest);
  Real* const out_columns = take(kTile<Real> * w.v_columns);
  g.grad_keys = take(kPanel<Real> * w.qk_columns);
  g.grad_values = take(kPanel<Real> * w.v_columns);
  g.weights = take(kPanel<Real> * kRows);
  g.slopes = take(kPanel<Real> * kRows);
  g.keys = keys, g.values = values, g.key_rows = key_rows;

  const Real* const lse_row = static_cast<const Real*>(lse) + (std::int64_t(b) * p.heads + head) * p.queries;
  std::fill_n(lse_of, padded, kInfinity<Real>);  // a row that is not there weighs nothing
  std::fill_n(delta, padded, Real(0));
  std::fill_n(grad_query, rows * w.qk_row, Real(0));
  std::fill_n(key_rows, kPanel<Real> * w.qk_row, Real(0));
  for (int n = 0; n < tiles; ++n) {
    const Tile& tile = plan.tiles[n];
    const std::int64_t place = std::int64_t(n) * kTile<Real>;
    Real* const grad_columns = grad + place * w.v_columns;
    load_queries(p, w, tile, b, head, staged, query + place * w.qk_columns);
    load_tile(tile, grad_out, b, head, w.v, w.v, w.v_columns, staged, grad_columns);
    load_tile(tile, out, b, head, w.v, w.v, w.v_columns, staged, out_columns);
    std::copy_n(lse_row + tile.query, tile.rows, lse_of + place);
    // In the order of the products with values: what they cancel to where a row sees one key is exactly zero.
    for (int d = 0; d < w.v; ++d) {
      for (int r = d * kTile<Real>, to = 0; to < kTile<Real>; r += kLanes<Real>, to += kLanes<Real>) {
        at(delta + place + to) += at(grad_columns + r) * at(out_columns + r);
      }
    }
  }
  for (const Panel& panel : plan.panels) {
    g.count = panel.count;
    load_panel(plan, panel, p.v, b, head, w.v, w.v, longest, staged, values);
    load_panel(plan, panel, p.k, b, head, p.widths, w.qk, w.qk_row, key_rows, keys);
    std::fill_n(g.grad_keys, kPanel<Real> * w.qk_columns, Real(0));
    std::fill_n(g.grad_values, kPanel<Real> * w.v_columns, Real(0));
    for (int n = panel.first_tile; n < panel.last_tile; ++n) {
      const std::int64_t place = std::int64_t(n) * kTile<Real>;
      g.query = query + place * w.qk_columns;
      g.grad_out = grad + place * w.v_columns;
      g.grad_query = grad_query + std::int64_t(plan.tiles[n].place) * w.qk_row;
      g.lse = lse_of + place;
      g.delta = delta + place;
      differentiate<kRows>(plan.tiles[n].height, g);
    }
    transpose(g.grad_keys, kPanel<Real>, w.qk, panel.count, panel.count, staged, longest);
    for (int j = 0; j < panel.count; ++j) {
      store_row(staged + j * longest, p.widths, grads.k, b, head, plan.keys[panel.first + j]);
    }
    transpose(g.grad_values, kPanel<Real>, w.v, panel.count, panel.count, staged, longest);
    for (int j = 0; j < panel.count; ++j) {
      store_row(staged + j * longest, w.v, grads.v, b, head, plan.keys[panel.first + j]);
    }
  }
  for (int n = 0; n < tiles; ++n) {
    const Tile& tile = plan.tiles[n];
    for (int r = 0; r < tile.rows; ++r) {
      Real* const found = grad_query + std::int64_t(tile.place + r) * w.qk_row;
      for (int d = 0; d < w.qk; ++d) found[d] *= Real(p.scale);
      store_row(found, p.widths, grads.q, b, head, tile.query + r);
    }
  }
  std::fill_n(staged, longest, Real(0));
  clear_others(p, plan, grads, b, head, staged);
}
