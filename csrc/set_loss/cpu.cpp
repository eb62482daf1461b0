// Class, L1 and GIoU losses of all decoder layers on the CPU; formulas are in dndetr/ops/set_loss.py and class_loss.py.
//
// One task is one image of one layer. Its rows of logits are copied, those that count, to a block in the computing type,
// negated at the target's class for focal loss, and left out there for the others, whose pairs follow one by one; loops over
// the block then fill whole registers whatever the number of classes. A task's sums are added to the others' in a fixed
// order, so results do not depend on threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/fused_sums.h"

#include "common/floats.h"
#include "common/ops.h"

namespace dndetr {
namespace {

constexpr int kParts = 6;
constexpr int kBlock = 1024;  // logits, or one row where that is longer

constexpr int kAlignment = 64;  // bytes, the widest register

#define DNDETR_KERNELS "set_loss/kernel.h"
#include "common/instruction_sets.h"

#include "set_loss/class_loss.h"

template <class Real>
struct Loops {
  Real (*losses)(Real*, int);
  void (*slopes)(Real*, int);
};

template <class Real>
Loops<Real> loops_for(ClassLoss kind, Simd simd) {
  if (kind == ClassLoss::mal) return {DNDETR_FOR(simd, losses<Real, true>), DNDETR_FOR(simd, slopes<Real, true>)};
  return {DNDETR_FOR(simd, losses<Real, false>), DNDETR_FOR(simd, slopes<Real, false>)};
}

template <class Real>
using Box = std::array<Real, 4>;

template <class Real>
struct BoxLoss {
  Real l1, giou, overlap;
};

// How much of max(a, b) moves with a: equal numbers share its gradient (dndetr/boxes.py).
template <class Real>
Real share(Real a, Real b) {
  return a > b ? Real(1) : a < b ? Real(0) : Real(0.5);
}

// |a - b|_1, 1 - GIoU and IoU of two cxcywh boxes, and, times the given scales, gradients of the first two with respect to a.
template <class Real>
BoxLoss<Real> box_loss(const Box<Real>& a, const Box<Real>& b, Real eps, Real by_l1, Real by_giou, Box<Real>& grad) {
  Real side_a[2], area_b = 1, inner[2], outer[2], low_a[2], high_a[2], low_b[2], high_b[2], l1 = 0;
  for (int axis = 0; axis < 2; ++axis) {
    low_a[axis] = a[axis] - Real(0.5) * a[axis + 2], high_a[axis] = a[axis] + Real(0.5) * a[axis + 2];
    low_b[axis] = b[axis] - Real(0.5) * b[axis + 2], high_b[axis] = b[axis] + Real(0.5) * b[axis + 2];
    side_a[axis] = high_a[axis] - low_a[axis];
    area_b *= high_b[axis] - low_b[axis];
    inner[axis] = std::min(high_a[axis], high_b[axis]) - std::max(low_a[axis], low_b[axis]);
    outer[axis] = std::max(high_a[axis], high_b[axis]) - std::min(low_a[axis], low_b[axis]);
  }
  const Real inner_w = std::max(inner[0], Real(0)), inner_h = std::max(inner[1], Real(0));
  const Real outer_w = std::max(outer[0], Real(0)), outer_h = std::max(outer[1], Real(0));
  const Real overlap = inner_w * inner_h, hull = outer_w * outer_h;
  const Real all = side_a[0] * side_a[1] + area_b - overlap;
  const Real iou = overlap / (all + eps), giou = iou - (hull - all) / (hull + eps);

  const Real per_union = 1 / (all + eps), per_hull = 1 / (hull + eps);
  const Real by_area = per_hull - overlap * per_union * per_union;  // of a, the overlap being what it is
  const Real by_overlap = per_union - by_area;
  const Real by_hull = -(all + eps) * per_hull * per_hull;
  const Real other_inner[2] = {inner_h, inner_w}, other_outer[2] = {outer_h, outer_w};
  for (int axis = 0; axis < 2; ++axis) {
    const Real side = by_area * side_a[1 - axis];
    const Real within = inner[axis] >= 0 ? by_overlap * other_inner[axis] : 0;
    const Real around = outer[axis] >= 0 ? by_hull * other_outer[axis] : 0;
    const Real high = side + within * share(high_b[axis], high_a[axis]) + around * share(high_a[axis], high_b[axis]);
    const Real low = -(side + within * share(low_a[axis], low_b[axis]) + around * share(low_b[axis], low_a[axis]));
    grad[axis] = -by_giou * (low + high);
    grad[axis + 2] = -by_giou * Real(0.5) * (high - low);
  }
  for (int k = 0; k < 4; ++k) {
    l1 += std::abs(a[k] - b[k]);
    grad[k] += by_l1 * static_cast<Real>((a[k] > b[k]) - (a[k] < b[k]));
  }
  return {l1, 1 - giou, iou};
}

struct Range {
  int begin, end;
};

// One image of one layer.
struct Task {
  const SetLoss& p;
  int image;
  int counted;         // slots of each group
  std::int64_t first;  // query of this task, in the order of memory

  Task(const SetLoss& problem, int task)
      : p(problem),
        image(task % problem.batch),
        counted(task / problem.batch < problem.proposals ? 0 : problem.counted[image]),
        first(std::int64_t(task) * problem.queries) {}

  bool counts(int q) const { return q >= p.denoising() || q % p.slots() < counted; }

  // Number of a query's target, or -1.
  int partner(int q) const {
    if (q < p.denoising()) {
      const int slot = q % p.slots(), object = slot / p.per_object;
      return slot < counted && slot % p.per_object == 0 && object < p.counts[image] ? object : -1;
    }
    const int matching = p.queries - p.denoising();
    const int found = p.target[first / p.queries * matching + q - p.denoising()];
    return found < p.objects ? found : -1;
  }

  // The target's class, or -1.
  int label(int q) const {
    const int t = partner(q);
    const std::int64_t k = t < 0 ? -1 : p.labels[std::int64_t(image) * p.objects + t];
    return k < p.classes ? static_cast<int>(k) : -1;
  }

  template <class Real>
  Box<Real> box(int q) const {
    Box<Real> to{};
    DNDETR_WITH_ELEMENT(p.boxes.dtype, load(static_cast<const Element*>(p.boxes.data) + (first + q) * 4, 4, to.data()))
    return to;
  }
  template <class Real>
  Box<Real> truth(int t) const {
    Box<Real> to;
    const std::int64_t object = std::int64_t(image) * p.objects + t;
    std::memcpy(to.data(), static_cast<const Real*>(p.target_boxes) + object * 4, sizeof to);
    return to;
  }

  template <class Real>
  Real logit(int q, int k) const {
    Real to;
    const std::int64_t place = (first + q) * p.classes + k;
    DNDETR_WITH_ELEMENT(p.logits.dtype, load(static_cast<const Element*>(p.logits.data) + place, 1, &to))
    return to;
  }

  template <class Element, class Real>
  static void load(const Element* from, int count, Real* to) {
    for (int k = 0; k < count; ++k) to[k] = static_cast<Real>(widen(from[k]));
  }

  // Logits of the queries of a range that count, a block at a time, at the target's class negated for focal loss and left out
  // for others: use(values, count, rows), where rows are the queries in the block and count is made whole lines.
  template <class Real, class Use>
  void for_each_block(Range range, ClassLoss kind, const Use& use) const {
    struct alignas(kAlignment) Line {
      Real value[kAlignment / sizeof(Real)];
    };
    constexpr int kLanes = kAlignment / sizeof(Real);
    const int rows_of_block = std::max(1, kBlock / std::max(p.classes, 1));
    std::vector<Line> lines(std::size_t(rows_of_block) * p.classes / kLanes + 1);
    Real* const values = lines[0].value;
    constexpr Real kNothing = -std::numeric_limits<Real>::infinity();  // neither loses nor slopes
    const auto finish = [&](const std::vector<int>& rows) {
      const int size = static_cast<int>(rows.size()) * p.classes, padded = (size + kLanes - 1) / kLanes * kLanes;
      std::fill(values + size, values + padded, kNothing);
      use(values, padded, rows);
    };
    std::vector<int> rows;
    rows.reserve(rows_of_block);
    for (int q = range.begin; q < range.end; ++q) {
      if (!counts(q)) continue;
      Real* row = values + rows.size() * p.classes;
      DNDETR_WITH_ELEMENT(p.logits.dtype,
                          load(static_cast<const Element*>(p.logits.data) + (first + q) * p.classes, p.classes, row))
      if (const int k = label(q); k >= 0) row[k] = kind == ClassLoss::focal ? -row[k] : kNothing;
      rows.push_back(q);
      if (static_cast<int>(rows.size()) < rows_of_block) continue;
      finish(rows);
      rows.clear();
    }
    if (!rows.empty()) finish(rows);
  }
};

// Half 0 are the matching queries, half 1 the denoising ones, as in the order of parts.
Range half_of(const SetLoss& p, int half) {
  return half == 0 ? Range{p.denoising(), p.queries} : Range{0, p.denoising()};
}

// Loops of both halves.
template <class Real>
using BothLoops = std::array<Loops<Real>, 2>;

// use(pair, its class loss) for the pairs that the blocks left out.
template <class Real, class Use>
void for_each_left_out(const Task& task, ClassLoss kind, const std::vector<Pair<Real>>& pairs, const Use& use) {
  if (kind == ClassLoss::focal) return;
  const Real alpha = static_cast<Real>(task.p.alpha), stretched = stretch(pairs);
  for (const Pair<Real>& pair : pairs) {
    if (pair.label < 0) continue;
    const Real logit = task.logit<Real>(pair.query, pair.label);
    use(pair, loss_at_target(kind, logit, pair.overlap, alpha, stretched));
  }
}

template <class Real>
void add_losses(const Task& task, const BothLoops<Real>& loops, double* sums) {
  const SetLoss& p = task.p;
  for (int half = 0; half < 2; ++half, sums += 3) {
    const Range range = half_of(p, half);
    const ClassLoss kind = p.kinds[half];
    const double negative = weighted(kind) ? 1 - p.alpha : 1;
    task.for_each_block<Real>(range, kind, [&](Real* values, int count, const std::vector<int>& rows) {
      double positive = 0;
      const double all = loops[half].losses(values, count);
      for (std::size_t row = 0; row < rows.size(); ++row) {
        if (const int k = task.label(rows[row]); k >= 0) positive += values[row * p.classes + k];
      }
      sums[0] += negative * all + (2 * p.alpha - 1) * positive;
    });
    std::vector<Pair<Real>> pairs;
    for (int q = range.begin; q < range.end; ++q) {
      const int t = task.partner(q);
      if (t < 0) continue;
      Box<Real> unused;
      const auto loss = box_loss(task.box<Real>(q), task.truth<Real>(t), Real(p.eps), Real(0), Real(0), unused);
      sums[1] += loss.l1;
      sums[2] += loss.giou;
      pairs.push_back({q, task.label(q), loss.overlap});
    }
    for_each_left_out(task, kind, pairs, [&](const Pair<Real>&, LossAndSlope<Real> of) { sums[0] += of.loss; });
  }
}

// `scale` [6]: what each part's sum is multiplied by on its way to the loss.
template <class Real>
void write_grads(const Task& task, const BothLoops<Real>& loops, const Real* scale, Array grad_logits, Array grad_boxes) {
  const SetLoss& p = task.p;
  const auto zero = [&](Array to, std::int64_t width) {
    DNDETR_WITH_ELEMENT(to.dtype, std::memset(static_cast<Element*>(to.data) + task.first * width, 0,
                                              p.queries * width * sizeof(Element)))
  };
  zero(grad_boxes, 4);
  if (p.denoising() > 0) zero(grad_logits, p.classes);
  for (int half = 0; half < 2; ++half, scale += 3) {
    const Range range = half_of(p, half);
    const ClassLoss kind = p.kinds[half];
    const Real negative = scale[0] * static_cast<Real>(weighted(kind) ? 1 - p.alpha : 1);
    const Real positive = -scale[0] * static_cast<Real>(p.alpha);
    task.for_each_block<Real>(range, kind, [&](Real* values, int count, const std::vector<int>& rows) {
      loops[half].slopes(values, count);
      for (const int q : rows) {
        const int label = task.label(q);
        DNDETR_WITH_ELEMENT(grad_logits.dtype, {
          Element* to = static_cast<Element*>(grad_logits.data) + (task.first + q) * p.classes;
          for (int k = 0; k < p.classes; ++k) to[k] = narrow<Element>(negative * values[k]);
          if (label >= 0) to[label] = narrow<Element>(positive * values[label]);
        })
        values += p.classes;
      }
    });
    std::vector<Pair<Real>> pairs;
    for (int q = range.begin; q < range.end; ++q) {
      const int t = task.partner(q);
      if (t < 0) continue;
      Box<Real> grad;
      const auto loss = box_loss(task.box<Real>(q), task.truth<Real>(t), Real(p.eps), scale[1], scale[2], grad);
      pairs.push_back({q, task.label(q), loss.overlap});
      DNDETR_WITH_ELEMENT(grad_boxes.dtype, {
        Element* to = static_cast<Element*>(grad_boxes.data) + (task.first + q) * 4;
        for (int k = 0; k < 4; ++k) to[k] = narrow<Element>(grad[k]);
      })
    }
    for_each_left_out(task, kind, pairs, [&](const Pair<Real>& pair, LossAndSlope<Real> of) {
      const std::int64_t place = (task.first + pair.query) * p.classes + pair.label;
      DNDETR_WITH_ELEMENT(grad_logits.dtype,
                          static_cast<Element*>(grad_logits.data)[place] = narrow<Element>(scale[0] * of.slope);)
    });
  }
}

// run(task) for all of them, by a team of threads if it pays to wake one.
template <class Run>
void for_each_task(const SetLoss& p, int threads, const Run& run) {
  constexpr double kLogitsPerTeam = 2e5;  // a third of a millisecond of one thread
  const int tasks = p.layers * p.batch;
  const int team = double(tasks) * p.queries * p.classes > kLogitsPerTeam ? std::min(threads, tasks) : 1;
#pragma omp parallel for num_threads(team) if (team > 1) schedule(dynamic)
  for (int task = 0; task < tasks; ++task) run(Task(p, task), task);
}

std::array<double, kParts> coefficients(const SetLoss& p) { return {p.label, p.l1, p.giou, p.label, p.l1, p.giou}; }

template <class Real>
void run_forward(const SetLoss& p, void* total, void* parts, int threads, Simd simd) {
  const BothLoops<Real> loops = {loops_for<Real>(p.kinds[0], simd), loops_for<Real>(p.kinds[1], simd)};
  std::vector<std::array<double, kParts>> sums(std::size_t(p.layers) * p.batch, std::array<double, kParts>{});
  for_each_task(p, threads, [&](const Task& task, int number) { add_losses<Real>(task, loops, sums[number].data()); });
  const auto weights = coefficients(p);
  double whole = 0;
  for (int layer = 0; layer < p.layers; ++layer) {
    for (int part = 0; part < kParts; ++part) {
      double sum = 0;
      for (int image = 0; image < p.batch; ++image) sum += sums[std::size_t(layer) * p.batch + image][part];
      sum /= static_cast<const Real*>(p.normalizers)[part / 3];
      static_cast<Real*>(parts)[layer * kParts + part] = static_cast<Real>(sum);
      whole += weights[part] * sum;
    }
  }
  *static_cast<Real*>(total) = static_cast<Real>(whole);
}

template <class Real>
void run_backward(const SetLoss& p, const void* grad_total, const void* grad_parts, Array grad_logits, Array grad_boxes,
                  int threads, Simd simd) {
  const BothLoops<Real> loops = {loops_for<Real>(p.kinds[0], simd), loops_for<Real>(p.kinds[1], simd)};
  const auto weights = coefficients(p);
  for_each_task(p, threads, [&](const Task& task, int number) {
    Real scale[kParts];
    for (int part = 0; part < kParts; ++part) {
      Real grad = grad_total ? static_cast<Real>(weights[part]) * *static_cast<const Real*>(grad_total) : Real(0);
      if (grad_parts) grad += static_cast<const Real*>(grad_parts)[number / p.batch * kParts + part];
      scale[part] = grad / static_cast<const Real*>(p.normalizers)[part / 3];
    }
    write_grads<Real>(task, loops, scale, grad_logits, grad_boxes);
  });
}

bool in_double(const SetLoss& p) { return p.logits.dtype == Dtype::float64 || p.boxes.dtype == Dtype::float64; }

}  // namespace

void set_loss(const SetLoss& p, void* total, void* parts, int threads, Simd simd) {
  const auto run = in_double(p) ? run_forward<double> : run_forward<float>;
  run(p, total, parts, threads, std::min(simd, best_simd()));
}

void set_loss_backward(const SetLoss& p, const void* grad_total, const void* grad_parts, Array grad_logits,
                       Array grad_boxes, int threads, Simd simd) {
  const auto run = in_double(p) ? run_backward<double> : run_backward<float>;
  run(p, grad_total, grad_parts, grad_logits, grad_boxes, threads, std::min(simd, best_simd()));
}

}  // namespace dndetr
