// Deformable attention on a GPU: launches of the forward kernels.
#include "common/cuda_launch.cuh"
#include "forward.cuh"
#include "plan.cuh"

namespace dndetr {

void ms_deform_attn_cuda(const DeformAttn& p, Array out, Stream stream) {
  deform::check_supported(p);
  if (p.batch == 0 || p.queries == 0 || p.heads == 0 || p.width == 0) return;
  const Launch launch("ms_deform_attn", stream);
  deform::with_kernel(p, [&](auto element, auto width) {
    using Element = decltype(element);
    using M = deform::Mapping<Element, width.value>;
    const auto run = [&](auto kernel, int parts) {
      const deform::Plan plan = deform::plan_for(p, M::vector, M::lanes * parts, parts, 1);
      kernel<<<plan.blocks, plan.threads, plan.shared, launch.stream()>>>(plan.problem, static_cast<Element*>(out.data));
    };
    if constexpr (width.value > 0) {
      if (deform::few_rows(p, M::lanes, launch.multiprocessors())) {
        return run(deform::forward<Element, width.value, true>, M::split);
      }
    }
    if constexpr (deform::has_half_kernels<Element, width.value>) {
      if (deform::has_half_weights<Element>(p) && launch.compiled_for(deform::half_forward<Element, deform::Mixed>) >= 80) {
        return deform::with_given<Element>(p, [&](auto given) {
          const deform::Plan plan = deform::half_plan_for(p, 4, 1);
          deform::half_forward<Element, decltype(given)>
              <<<plan.blocks, plan.threads, plan.shared, launch.stream()>>>(plan.problem, static_cast<Element*>(out.data));
        });
      }
    }
    run(deform::forward<Element, width.value, false>, 1);
  });
  launch.check();
}

}  // namespace dndetr
