// Deformable attention on a GPU: launches of the backward kernels.
#include "common/cuda_launch.cuh"
#include "backward.cuh"
#include "plan.cuh"

namespace dndetr {

void ms_deform_attn_backward_cuda(const DeformAttn& p, Array grad_out, const DeformAttnGrads& grads,
                                  const float* fixed_point, Stream stream) {
  deform::check_supported(p);
  if (p.batch == 0 || p.queries == 0 || p.heads == 0 || p.width == 0) return;
  const Launch launch("ms_deform_attn_backward", stream);
  const deform::Outputs outputs{grads.value.data,     grads.reference,     grads.offsets, grads.logits,
                                 grads.offsets_stride, grads.logits_stride, fixed_point};
  deform::with_kernel(p, [&](auto element, auto width) {
    using Element = decltype(element);
    const auto start = [&](auto kernel, const deform::Plan& plan) {
      kernel<<<plan.blocks, plan.threads, plan.shared, launch.stream()>>>(
          plan.problem, static_cast<const Element*>(grad_out.data), outputs);
      launch.check();
    };
    const auto run = [&](auto kernel, auto mapping, int parts, int slots) {
      start(kernel, deform::plan_for(p, mapping.vector, mapping.lanes * parts, parts, slots));
    };
    using M = deform::Mapping<Element, width.value>;
    const bool few = width.value > 0 && deform::few_rows(p, M::lanes, launch.multiprocessors());
    if constexpr (deform::has_half_kernels<Element, width.value>) {
      const deform::Plan plan = deform::value_plan_for<Element, width.value>(p);
      const auto tiles = [&](auto fixed, auto given) {
        using Given = decltype(given);
        const auto kernel = deform::value_gradient<Element, width.value, fixed.value, Given>;
        launch.raise(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared)));
        start(kernel, plan);
        start(deform::half_backward<Element, Given>, deform::half_plan_for(p, 8, 2));
      };
      if (!few && deform::has_tiles(p) && plan.shared <= launch.most_shared() &&
          launch.compiled_for(deform::half_backward<Element, deform::Mixed>) >= 80) {
        if (fixed_point != nullptr) return tiles(std::true_type{}, deform::Mixed{});
        return deform::with_given<Element>(p, [&](auto given) { tiles(std::false_type{}, given); });
      }
    }
    // One kernel for all widths is enough where sums are of whole numbers, which takes longer than the rest.
    if (fixed_point != nullptr) {
      run(deform::backward<Element, 0, false, true>, deform::Mapping<Element, 0>{}, 1, 2);
    } else if constexpr (width.value == 0) {
      run(deform::backward<Element, 0, false, false>, M{}, 1, 2);
    } else if (few) {
      run(deform::backward<Element, width.value, true, false>, M{}, M::split, 1);
    } else {
      run(deform::backward<Element, width.value, false, false>, M{}, 1, 1);
    }
  });
}


}  // namespace dndetr
