// The CUDA kernels of deformable attention, run on the host.
#include "cuda_on_host.h"
#include "mma_on_host.h"

#include "ms_deform_attn/backward.cuh"
#include "ms_deform_attn/forward.cuh"
#include "ms_deform_attn/plan.cuh"

namespace dndetr::deform {
float4 shared[227 * 1024 / sizeof(float4)];
}

using namespace dndetr;

namespace {

// What a launch would choose from: a kernel for a row's lanes, rows split, sums of whole numbers, tensor cores (with sums of
// a tile where queries are pixels), both of these.
enum Variant { rows, split, fixed_point, tiles, fixed_tiles };

template <class Element, int Width, bool Split, bool Fixed>
void run(const DeformAttn& p, void* out, const void* grad_out, const deform::Outputs& grads) {
  using M = deform::Mapping<Element, Width>;
  const int parts = Split ? M::split : 1, slots = grad_out != nullptr && Width == 0 ? 2 : 1;
  const deform::Plan plan = deform::plan_for(p, M::vector, M::lanes * parts, parts, slots);
  emulator::launch(plan.blocks, plan.threads, [&] {
    if (grad_out == nullptr) {
      deform::forward<Element, Width, Split>(plan.problem, static_cast<Element*>(out));
    } else {
      deform::backward<Element, Width, Split, Fixed>(plan.problem, static_cast<const Element*>(grad_out), grads);
    }
  });
}

// Garbage, and bounds: nothing is zero in advance, and nothing beyond what was asked for may change.
template <class Kernel>
void run_within_bounds(const deform::Plan& plan, const Kernel& kernel) {
  std::fill(std::begin(deform::shared), std::end(deform::shared), float4{-7, -7, -7, -7});
  emulator::launch(plan.blocks, plan.threads, kernel);
  for (std::size_t i = (plan.shared + 15) / 16; i < std::size(deform::shared); ++i) {
    if (deform::shared[i].x != -7) throw std::runtime_error("a write outside of shared memory");
  }
}

template <class Element, int Width, bool Fixed, class Given>
void run_tiles(const DeformAttn& p, const void* grad_out, const deform::Outputs& grads) {
  const auto* const from = static_cast<const Element*>(grad_out);
  const deform::Plan value = deform::value_plan_for<Element, Width>(p), others = deform::half_plan_for(p, 8, 2);
  run_within_bounds(value, [&] { deform::value_gradient<Element, Width, Fixed, Given>(value.problem, from, grads); });
  run_within_bounds(others, [&] { deform::half_backward<Element, Given>(others.problem, from, grads); });
}

}  // namespace

// Numbers added to the gradient of value since the last call.
extern "C" std::int64_t sums() { return std::exchange(emulator::sums, 0); }

// sizes: batch, queries, heads, width, points, reference width, levels, variant, descending turns, value's strides, and those
// from a query to the next of offsets and logits, and of their gradients.
// arrays: value, reference, offsets, logits, valid sizes, out, grad_out, the four gradients, fixed point; with dtypes.
extern "C" const char* emulate(const std::int64_t* sizes, const int* shapes, void* const* arrays, const int* dtypes,
                               const std::int64_t* bytes) {
  static std::string message;
  const auto array = [&](int i) { return Array{arrays[i], static_cast<Dtype>(dtypes[i])}; };
  const DeformAttn p{int(sizes[0]),  int(sizes[1]), int(sizes[2]), int(sizes[3]), int(sizes[6]), int(sizes[4]),
                     int(sizes[5]),  shapes,        array(0),      sizes[9],      sizes[10],     sizes[11],
                     array(1),       array(2),      array(3),      sizes[12],
                     sizes[13],      static_cast<const std::int64_t*>(arrays[4])};
  const deform::Outputs grads{arrays[7], array(8),  array(9), array(10),
                              sizes[14], sizes[15], static_cast<const float*>(arrays[11])};
  const int variant = int(sizes[7]);
  emulator::descending = sizes[8] != 0;
  emulator::reads_outside = false;
  emulator::readable.clear();
  for (const int i : {0, 6}) {
    const auto first = reinterpret_cast<std::uintptr_t>(arrays[i]);
    emulator::readable.emplace_back(first, first + bytes[i]);
  }
  try {
    deform::check_supported(p);
    deform::with_kernel(p, [&](auto element, auto width) {
      using Element = decltype(element);
      if (variant == fixed_point) return run<Element, 0, false, true>(p, arrays[5], arrays[6], grads);
      if constexpr (width.value > 0) {
        if (variant == split) return run<Element, width.value, true, false>(p, arrays[5], arrays[6], grads);
      }
      if constexpr (deform::has_half_kernels<Element, width.value>) {
        if (variant >= tiles && arrays[6] == nullptr && deform::has_half_weights<Element>(p)) {
          return deform::with_given<Element>(p, [&](auto given) {
            const deform::Plan plan = deform::half_plan_for(p, 4, 1);
            auto* const to = static_cast<Element*>(arrays[5]);
            run_within_bounds(plan, [&] { deform::half_forward<Element, decltype(given)>(plan.problem, to); });
          });
        }
        if (variant >= tiles && arrays[6] != nullptr && deform::has_tiles(p)) {
          if (variant == fixed_tiles) return run_tiles<Element, width.value, true, deform::Mixed>(p, arrays[6], grads);
          return deform::with_given<Element>(
              p, [&](auto given) { run_tiles<Element, width.value, false, decltype(given)>(p, arrays[6], grads); });
        }
      }
      if (variant == fixed_tiles && arrays[6] != nullptr) {
        return run<Element, 0, false, true>(p, arrays[5], arrays[6], grads);
      }
      run<Element, width.value, false, false>(p, arrays[5], arrays[6], grads);
    });
    message = emulator::reads_outside ? "a read outside of value and grad_out, or not aligned" : "";
  } catch (const std::exception& failure) {
    message = failure.what();
  }
  return message.c_str();
}
