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
  const deform::Outputs outputs{grads.value.data, grads.reference, grads.offsets, grads.logits, fixed_point};
  deform::with_kernel(p, [&](auto element, auto width) {
    using Element = decltype(element);
    const auto run = [&](auto kernel, auto mapping, int parts, int slots) {
      const deform::Plan plan = deform::plan_for(p, mapping.vector, mapping.lanes * parts, parts, slots);
      kernel<<<plan.blocks, plan.threads, plan.shared, launch.stream()>>>(
          plan.problem, static_cast<const Element*>(grad_out.data), outputs);
    };
    // One kernel for all widths is enough where sums are of whole numbers, which takes longer than the rest.
    if (fixed_point != nullptr) {
      return run(deform::backward<Element, 0, false, true, true>, deform::Mapping<Element, 0>{}, 1, 2);
    }
    using M = deform::Mapping<Element, width.value>;
    if constexpr (width.value == 0) {
      return run(deform::backward<Element, 0, false, false, true>, M{}, 1, 2);
    } else {
      if (deform::few_rows(p, M::lanes, launch.multiprocessors())) {
        return run(deform::backward<Element, width.value, true, false, true>, M{}, M::split, 1);
      }
      if constexpr (deform::has_value_gradient<Element, width.value>) {
        const auto kernel = deform::value_gradient<Element, width.value, deform::Mixed>;
        if (deform::has_tiles(p) && launch.compiled_for(kernel) >= 80) {
          const deform::Plan plan = deform::value_plan_for<Element, width.value>(p);
          if (plan.shared <= launch.most_shared()) {
            launch.raise(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared)));
            kernel<<<plan.blocks, plan.threads, plan.shared, launch.stream()>>>(
                plan.problem, static_cast<const Element*>(grad_out.data), static_cast<float*>(grads.value.data));
            launch.check();
            return run(deform::backward<Element, width.value, false, false, false>, M{}, 1, 1);
          }
        }
      }
      run(deform::backward<Element, width.value, false, false, true>, M{}, 1, 1);
    }
  });
  launch.check();
}

}  // namespace dndetr
