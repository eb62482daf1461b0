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

// The kernels that a launch would choose from: variant 0 as many rows as threads, 1 rows split, 2 in fixed point, 3 the
// gradient of value apart.
template <class Element, int Width, bool Split, bool Fixed, bool Spread = true>
void run(const DeformAttn& p, void* out, const void* grad_out, const deform::Outputs& grads) {
  using M = deform::Mapping<Element, Width>;
  const int parts = Split ? M::split : 1, slots = grad_out != nullptr && Width == 0 ? 2 : 1;
  const deform::Plan plan = deform::plan_for(p, M::vector, M::lanes * parts, parts, slots);
  emulator::launch(plan.blocks, plan.threads, [&] {
    if (grad_out == nullptr) {
      deform::forward<Element, Width, Split>(plan.problem, static_cast<Element*>(out));
    } else {
      deform::backward<Element, Width, Split, Fixed, Spread>(plan.problem, static_cast<const Element*>(grad_out), grads);
    }
  });
}

template <class Element, int Width>
void run_value_gradient(const DeformAttn& p, const void* grad_out, void* to) {
  const deform::Plan plan = deform::value_plan_for<Element, Width>(p);
  // Garbage, and bounds: nothing is zero in advance, and nothing beyond what was asked for may change.
  std::fill(std::begin(deform::shared), std::end(deform::shared), float4{-7, -7, -7, -7});
  emulator::launch(plan.blocks, plan.threads, [&] {
    deform::value_gradient<Element, Width, deform::Mixed>(plan.problem, static_cast<const Element*>(grad_out), static_cast<float*>(to));
  });
  for (std::size_t i = (plan.shared + 15) / 16; i < std::size(deform::shared); ++i) {
    if (deform::shared[i].x != -7) throw std::runtime_error("a write outside of shared memory");
  }
}

}  // namespace

// sizes: batch, queries, heads, width, points, reference width, levels, variant, descending turns, and value's strides.
// arrays: value, reference, offsets, logits, valid sizes, out, grad_out, the four gradients, fixed point; with dtypes.
extern "C" const char* emulate(const std::int64_t* sizes, const int* shapes, void* const* arrays, const int* dtypes,
                               const std::int64_t* bytes) {
  static std::string message;
  const auto array = [&](int i) { return Array{arrays[i], static_cast<Dtype>(dtypes[i])}; };
  const DeformAttn p{int(sizes[0]),  int(sizes[1]), int(sizes[2]), int(sizes[3]), int(sizes[6]), int(sizes[4]),
                     int(sizes[5]),  shapes,        array(0),      sizes[9],      sizes[10],     sizes[11],
                     array(1),       array(2),      array(3),      static_cast<const std::int64_t*>(arrays[4])};
  const deform::Outputs grads{arrays[7], array(8), array(9), array(10), static_cast<const float*>(arrays[11])};
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
      if (variant == 2) return run<Element, 0, false, true>(p, arrays[5], arrays[6], grads);
      if constexpr (width.value > 0) {
        if (variant == 1) return run<Element, width.value, true, false>(p, arrays[5], arrays[6], grads);
      }
      if constexpr (deform::has_value_gradient<Element, width.value>) {
        if (variant == 3 && arrays[6] != nullptr && deform::has_tiles(p)) {
          run_value_gradient<Element, width.value>(p, arrays[6], grads.value);
          return run<Element, width.value, false, false, false>(p, arrays[5], arrays[6], grads);
        }
      }
      run<Element, width.value, false, false>(p, arrays[5], arrays[6], grads);
    });
    message = emulator::reads_outside ? "a read outside of value and grad_out, or not aligned" : "";
  } catch (const std::exception& failure) {
    message = failure.what();
  }
  return message.c_str();
}
