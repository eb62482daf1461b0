// dndetr._C: Python names for the launchers. Pointers arrive as integers (tensor.data_ptr()), the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/ops.h"

namespace py = pybind11;

namespace {

constexpr std::array<const char*, 3> kSimdNames = {"plain", "avx2", "avx512"};

dndetr::Simd simd_named(const std::string& name) {
  if (name.empty()) return dndetr::best_simd();
  for (std::size_t k = 0; k < kSimdNames.size(); ++k) {
    if (name == kSimdNames[k]) return static_cast<dndetr::Simd>(k);
  }
  throw py::value_error("unknown instruction set '" + name + "', choose one of plain, avx2, avx512");
}

// (tensor.data_ptr(), number of its dtype)
using Pointer = std::pair<std::uintptr_t, int>;

dndetr::Array array_at(Pointer p) { return {reinterpret_cast<void*>(p.first), static_cast<dndetr::Dtype>(p.second)}; }

dndetr::AssignProblems assign_problems(std::uintptr_t cost, bool is_double, std::array<int, 3> shape,
                                       std::array<std::int64_t, 3> strides, std::uintptr_t counts,
                                       std::uintptr_t query_of) {
  return {reinterpret_cast<const void*>(cost),           is_double,  shape[0],   shape[1],
          shape[2],                                      strides[0], strides[1], strides[2],
          reinterpret_cast<const std::int32_t*>(counts), reinterpret_cast<std::int32_t*>(query_of)};
}

void assign(std::uintptr_t cost, bool is_double, std::array<int, 3> shape, std::array<std::int64_t, 3> strides,
            std::uintptr_t counts, std::uintptr_t query_of, int threads, const std::string& simd) {
  const auto problems = assign_problems(cost, is_double, shape, strides, counts, query_of);
  const dndetr::Simd chosen = simd_named(simd);
  py::gil_scoped_release release;
  dndetr::assign(problems, threads, chosen);
}

#ifdef WITH_CUDA
// _backend.cuda_stream(tensor): device index, and handle of its current stream.
using StreamHandle = std::pair<int, std::uintptr_t>;

dndetr::Stream stream_at(StreamHandle s) { return {s.first, reinterpret_cast<void*>(s.second)}; }
#endif

// `shape`: layers, batch, queries, classes, target slots; `weights`: label, l1, giou, alpha, position.
dndetr::MatchInputs match_inputs(std::array<int, 5> shape, Pointer logits, std::array<std::int64_t, 3> logits_strides,
                                 Pointer boxes, std::array<std::int64_t, 3> boxes_strides, std::uintptr_t labels,
                                 Pointer target_boxes, std::uintptr_t counts, std::array<double, 5> weights) {
  return {shape[0],
          shape[1],
          shape[2],
          shape[3],
          shape[4],
          array_at(logits),
          array_at(boxes),
          {logits_strides[0], logits_strides[1], logits_strides[2]},
          {boxes_strides[0], boxes_strides[1], boxes_strides[2]},
          reinterpret_cast<const std::int64_t*>(labels),
          array_at(target_boxes),
          reinterpret_cast<const std::int32_t*>(counts),
          {weights[0], weights[1], weights[2], weights[3], weights[4]}};
}

// `sets` and the addresses of query, target and finite.
dndetr::MatchOutputs match_outputs(int sets, std::array<std::uintptr_t, 3> outputs) {
  return {sets, reinterpret_cast<std::int32_t*>(outputs[0]), reinterpret_cast<std::int32_t*>(outputs[1]),
          reinterpret_cast<bool*>(outputs[2])};
}

#ifdef WITH_CUDA
void assign_cuda(std::uintptr_t cost, bool is_double, std::array<int, 3> shape, std::array<std::int64_t, 3> strides,
                 std::uintptr_t counts, std::uintptr_t query_of, bool exact, std::uintptr_t workspace,
                 StreamHandle stream) {
  const auto problems = assign_problems(cost, is_double, shape, strides, counts, query_of);
  py::gil_scoped_release release;
  dndetr::assign_cuda(problems, exact, reinterpret_cast<void*>(workspace), stream_at(stream));
}

void match_cuda(const dndetr::MatchInputs& inputs, int sets, std::array<std::uintptr_t, 3> outputs, bool exact,
                std::uintptr_t workspace, StreamHandle stream) {
  py::gil_scoped_release release;
  dndetr::match_cuda(inputs, match_outputs(sets, outputs), exact, reinterpret_cast<void*>(workspace),
                     stream_at(stream));
}

std::int64_t match_workspace(int queries, int slots, bool is_double, StreamHandle stream) {
  return dndetr::match_workspace(queries, slots, is_double, stream_at(stream));
}
#endif

void match_cost(const dndetr::MatchInputs& inputs, std::uintptr_t cost, int threads, const std::string& simd) {
  const dndetr::Simd chosen = simd_named(simd);
  py::gil_scoped_release release;
  dndetr::match_cost(inputs, reinterpret_cast<void*>(cost), threads, chosen);
}

void match(const dndetr::MatchInputs& inputs, int sets, std::array<std::uintptr_t, 3> outputs, int threads,
           const std::string& simd) {
  const dndetr::Simd chosen = simd_named(simd);
  py::gil_scoped_release release;
  dndetr::match(inputs, match_outputs(sets, outputs), threads, chosen);
}

// An array, and elements from one query's to the next.
using Rows = std::pair<Pointer, std::int64_t>;

// What both directions of deformable attention are given. `sizes`: batch, queries, heads, width, points, reference width.
struct DeformAttnArguments {
  std::array<int, 6> sizes;
  std::vector<int> shapes;
  Pointer value;
  std::array<std::int64_t, 3> value_strides;
  Pointer reference;
  Rows offsets, logits;
  std::uintptr_t valid_sizes;

  dndetr::DeformAttn problem() const {
    return {sizes[0],
            sizes[1],
            sizes[2],
            sizes[3],
            static_cast<int>(shapes.size() / 2),
            sizes[4],
            sizes[5],
            shapes.data(),
            array_at(value),
            value_strides[0],
            value_strides[1],
            value_strides[2],
            array_at(reference),
            array_at(offsets.first),
            array_at(logits.first),
            offsets.second,
            logits.second,
            reinterpret_cast<const std::int64_t*>(valid_sizes)};
  }
};

void ms_deform_attn(const DeformAttnArguments& arguments, Pointer out, int threads, const std::string& simd) {
  const dndetr::Simd chosen = simd_named(simd);
  py::gil_scoped_release release;
  dndetr::ms_deform_attn(arguments.problem(), array_at(out), threads, chosen);
}

void ms_deform_attn_backward(const DeformAttnArguments& arguments, Pointer grad_out, Pointer grad_value,
                             Pointer grad_reference, const Rows& grad_offsets, const Rows& grad_logits, int threads,
                             const std::string& simd) {
  const dndetr::Simd chosen = simd_named(simd);
  const dndetr::DeformAttnGrads grads{array_at(grad_value),        array_at(grad_reference), array_at(grad_offsets.first),
                                      array_at(grad_logits.first), grad_offsets.second,      grad_logits.second};
  py::gil_scoped_release release;
  dndetr::ms_deform_attn_backward(arguments.problem(), array_at(grad_out), grads, threads, chosen);
}

#ifdef WITH_CUDA
void ms_deform_attn_cuda(const DeformAttnArguments& arguments, Pointer out, StreamHandle stream) {
  py::gil_scoped_release release;
  dndetr::ms_deform_attn_cuda(arguments.problem(), array_at(out), stream_at(stream));
}

void ms_deform_attn_backward_cuda(const DeformAttnArguments& arguments, Pointer grad_out, Pointer grad_value,
                                  Pointer grad_reference, const Rows& grad_offsets, const Rows& grad_logits,
                                  std::uintptr_t fixed_point, StreamHandle stream) {
  const dndetr::DeformAttnGrads grads{array_at(grad_value),        array_at(grad_reference), array_at(grad_offsets.first),
                                      array_at(grad_logits.first), grad_offsets.second,      grad_logits.second};
  py::gil_scoped_release release;
  dndetr::ms_deform_attn_backward_cuda(arguments.problem(), array_at(grad_out), grads,
                                       reinterpret_cast<const float*>(fixed_point), stream_at(stream));
}
#endif

// Address, number of the dtype, strides of image, head and row, width.
using HeadsArgument = std::array<std::int64_t, 6>;

dndetr::Heads heads_at(const HeadsArgument& x) {
  return {{reinterpret_cast<void*>(x[0]), static_cast<dndetr::Dtype>(x[1])}, x[2], x[3], x[4]};
}

// `sizes`: batch, heads, queries, keys, groups, slots; queries and keys in one part, or in two.
dndetr::Attention attention_problem(std::array<int, 6> sizes, const std::vector<HeadsArgument>& q,
                                    const std::vector<HeadsArgument>& k, const HeadsArgument& v, double scale,
                                    std::uintptr_t active, std::uintptr_t valid) {
  return {sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          {static_cast<int>(q.front()[5]), q.size() > 1 ? static_cast<int>(q.back()[5]) : 0},
          static_cast<int>(v[5]),
          {heads_at(q.front()), heads_at(q.back())},
          {heads_at(k.front()), heads_at(k.back())},
          heads_at(v),
          scale,
          sizes[4],
          sizes[5],
          reinterpret_cast<const std::int32_t*>(active),
          reinterpret_cast<const bool*>(valid)};
}

void attention(const dndetr::Attention& problem, const HeadsArgument& out, std::uintptr_t lse, int threads,
               const std::string& simd) {
  const dndetr::Simd chosen = simd_named(simd);
  py::gil_scoped_release release;
  dndetr::attention(problem, heads_at(out), reinterpret_cast<void*>(lse), threads, chosen);
}

void attention_backward(const dndetr::Attention& problem, const HeadsArgument& grad_out, const HeadsArgument& out,
                        std::uintptr_t lse, const std::vector<HeadsArgument>& grad_q,
                        const std::vector<HeadsArgument>& grad_k, const HeadsArgument& grad_v, int threads,
                        const std::string& simd) {
  const dndetr::Simd chosen = simd_named(simd);
  const dndetr::AttentionGrads grads{{heads_at(grad_q.front()), heads_at(grad_q.back())},
                                     {heads_at(grad_k.front()), heads_at(grad_k.back())},
                                     heads_at(grad_v)};
  py::gil_scoped_release release;
  dndetr::attention_backward(problem, heads_at(grad_out), heads_at(out), reinterpret_cast<const void*>(lse), grads, threads,
                             chosen);
}

// `sizes`: batch, height, width; `arrays`: addresses of pixels, colours and sizes.
void normalise(std::array<int, 3> sizes, std::array<std::uintptr_t, 3> arrays, Pointer out, int threads,
               const std::string& simd) {
  const dndetr::Simd chosen = simd_named(simd);
  const dndetr::Normalise problem{sizes[0],
                                  sizes[1],
                                  sizes[2],
                                  reinterpret_cast<const std::uint8_t*>(arrays[0]),
                                  reinterpret_cast<const double*>(arrays[1]),
                                  reinterpret_cast<const std::int64_t*>(arrays[2])};
  py::gil_scoped_release release;
  dndetr::normalise(problem, array_at(out), threads, chosen);
}

// `sizes`: height, width, new height, new width; `flips`: left with right, top with bottom.
void resize(std::array<int, 4> sizes, std::array<float, 4> box, std::array<bool, 2> flips, std::uintptr_t pixels,
            std::uintptr_t out, const std::string& simd) {
  const dndetr::Simd chosen = simd_named(simd);
  const dndetr::Resize problem{sizes[0], sizes[1], sizes[2], sizes[3], box, flips[0], flips[1]};
  py::gil_scoped_release release;
  dndetr::resize(problem, reinterpret_cast<const std::uint8_t*>(pixels), reinterpret_cast<std::uint8_t*>(out), chosen);
}

dndetr::SetLoss set_loss_problem(std::array<int, 8> sizes, Pointer logits, Pointer boxes,
                                 std::array<std::uintptr_t, 6> others, std::array<double, 5> weights,
                                 std::array<int, 2> kinds) {
  return {sizes[0],        sizes[1],
          sizes[2],        sizes[3],
          sizes[4],        sizes[5],
          sizes[6],        sizes[7],
          array_at(logits), array_at(boxes),
          reinterpret_cast<const std::int32_t*>(others[0]),
          reinterpret_cast<const std::int64_t*>(others[1]),
          reinterpret_cast<const void*>(others[2]),
          reinterpret_cast<const std::int32_t*>(others[3]),
          reinterpret_cast<const std::int32_t*>(others[4]),
          reinterpret_cast<const void*>(others[5]),
          weights[0],      weights[1],
          weights[2],      weights[3],
          weights[4],
          {dndetr::ClassLoss(kinds[0]), dndetr::ClassLoss(kinds[1])}};
}

void set_loss(const dndetr::SetLoss& problem, std::uintptr_t total, std::uintptr_t parts, int threads,
              const std::string& simd) {
  const dndetr::Simd chosen = simd_named(simd);
  py::gil_scoped_release release;
  dndetr::set_loss(problem, reinterpret_cast<void*>(total), reinterpret_cast<void*>(parts), threads, chosen);
}

void set_loss_backward(const dndetr::SetLoss& problem, std::uintptr_t grad_total, std::uintptr_t grad_parts,
                       Pointer grad_logits, Pointer grad_boxes, int threads, const std::string& simd) {
  const dndetr::Simd chosen = simd_named(simd);
  py::gil_scoped_release release;
  dndetr::set_loss_backward(problem, reinterpret_cast<const void*>(grad_total), reinterpret_cast<const void*>(grad_parts),
                            array_at(grad_logits), array_at(grad_boxes), threads, chosen);
}

typedef std::array<int, 6> Conv3x3Sizes;  // batch, height, width, inputs, outputs, stride
dndetr::Conv3x3 conv3x3_problem(Conv3x3Sizes sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
}

std::array<std::int64_t, 3> conv3x3_workspace(Conv3x3Sizes sizes, int threads, const std::string& simd) {
  const auto needed = dndetr::conv3x3_workspace(conv3x3_problem(sizes), threads, simd_named(simd));
  return {needed.forward, needed.grad_input, needed.grad_weight};
}

typedef std::array<std::int64_t, 3> WeightGradientSizes;  // rows, inputs, outputs
dndetr::WeightGradients weight_gradients_problem(WeightGradientSizes sizes) {
  return {sizes[0], static_cast<int>(sizes[1]), static_cast<int>(sizes[2])};
}

std::int64_t weight_gradients_workspace(WeightGradientSizes sizes, int threads, const std::string& simd) {
  return dndetr::weight_gradients_workspace(weight_gradients_problem(sizes), threads, simd_named(simd));
}

// `arrays`: addresses as the launcher has them, 0 for none, the workspace last.
template <auto Launcher, auto ProblemOf, class Sizes, std::size_t Count>
void launch(Sizes sizes, std::array<std::uintptr_t, Count> arrays, int threads, const std::string& simd) {
  const auto problem = ProblemOf(sizes);
  const dndetr::Simd chosen = simd_named(simd);
  py::gil_scoped_release release;
  const auto run = [&](auto... address) { Launcher(problem, reinterpret_cast<float*>(address)..., threads, chosen); };
  std::apply(run, arrays);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of dndetr: raw pointers in, no torch inside.";
  m.def("simd", [] { return kSimdNames[static_cast<std::size_t>(dndetr::best_simd())]; },
        "Name of the widest instruction set used on this machine.");
  m.def("assign", &assign, py::arg("cost"), py::arg("is_double"), py::arg("shape"), py::arg("strides"), py::arg("counts"),
        py::arg("query_of"), py::arg("threads") = 1, py::arg("simd") = "",
        "Exact assignment of every problem: cost [M, N, T] at any strides, counts [M] int32 -> query_of [M, T] int32.");
  py::class_<dndetr::MatchInputs>(m, "MatchInputs", "Predictions and targets; whoever makes one keeps them alive.")
      .def(py::init(&match_inputs), py::arg("shape"), py::arg("logits"), py::arg("logits_strides"), py::arg("boxes"),
           py::arg("boxes_strides"), py::arg("labels"), py::arg("target_boxes"), py::arg("counts"), py::arg("weights"));
  m.def("match_cost", &match_cost, py::arg("inputs"), py::arg("cost"), py::arg("threads") = 1, py::arg("simd") = "",
        "Matching cost: -> cost [Y, B, T, N], infinite where padded.");
  m.def("match", &match, py::arg("inputs"), py::arg("sets"), py::arg("outputs"), py::arg("threads") = 1,
        py::arg("simd") = "",
        "Cost and assignment: -> query [Y, B, sets, T] int32, target [Y, B, N] int32, finite [Y, B, sets] bool.");
#ifdef WITH_CUDA
  m.def("assign_cuda", &assign_cuda, py::arg("cost"), py::arg("is_double"), py::arg("shape"), py::arg("strides"),
        py::arg("counts"), py::arg("query_of"), py::arg("exact"), py::arg("workspace"), py::arg("stream"),
        "Assignment on a GPU, as on the CPU; `exact`: sums in double.");
  m.def("match_cuda", &match_cuda, py::arg("inputs"), py::arg("sets"), py::arg("outputs"), py::arg("exact"),
        py::arg("workspace"), py::arg("stream"), "Cost and assignment on a GPU, as on the CPU.");
  m.def("match_workspace", &match_workspace, py::arg("queries"), py::arg("slots"), py::arg("is_double"),
        py::arg("stream"), "Costs of workspace that a problem of this size needs: 0 where shared memory holds them.");
#endif
  py::class_<DeformAttnArguments>(m, "DeformAttn", "Inputs of deformable attention; whoever makes one keeps them alive.")
      .def(py::init<std::array<int, 6>, std::vector<int>, Pointer, std::array<std::int64_t, 3>, Pointer, Rows, Rows,
                    std::uintptr_t>(),
           py::arg("sizes"), py::arg("shapes"), py::arg("value"), py::arg("value_strides"), py::arg("reference"),
           py::arg("offsets"), py::arg("logits"), py::arg("valid_sizes"));
  m.def("ms_deform_attn", &ms_deform_attn, py::arg("problem"), py::arg("out"), py::arg("threads") = 1,
        py::arg("simd") = "", "Deformable attention: -> out [B, Q, H, D].");
  m.def("ms_deform_attn_backward", &ms_deform_attn_backward, py::arg("problem"), py::arg("grad_out"),
        py::arg("grad_value"), py::arg("grad_reference"), py::arg("grad_offsets"), py::arg("grad_logits"),
        py::arg("threads") = 1, py::arg("simd") = "", "Its gradients; that of the references per head, [B, H, Q, L, R].");
#ifdef WITH_CUDA
  m.def("ms_deform_attn_cuda", &ms_deform_attn_cuda, py::arg("problem"), py::arg("out"), py::arg("stream"),
        "Deformable attention on a GPU: -> out [B, Q, H, D].");
  m.def("ms_deform_attn_backward_cuda", &ms_deform_attn_backward_cuda, py::arg("problem"), py::arg("grad_out"),
        py::arg("grad_value"), py::arg("grad_reference"), py::arg("grad_offsets"), py::arg("grad_logits"),
        py::arg("fixed_point"), py::arg("stream"),
        "Its gradients: grad_value zeroed float32, or int64 in units of one by *fixed_point; the rest as on the CPU.");
#endif
  py::class_<dndetr::Attention>(m, "Attention", "Inputs of attention; whoever makes one keeps them alive.")
      .def(py::init(&attention_problem), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"),
           py::arg("active"), py::arg("valid"));
  m.def("attention", &attention, py::arg("problem"), py::arg("out"), py::arg("lse"), py::arg("threads") = 1,
        py::arg("simd") = "", "Attention in groups or past valid keys: -> out [B, H, Q, value width], lse [B, H, Q].");
  m.def("attention_backward", &attention_backward, py::arg("problem"), py::arg("grad_out"), py::arg("out"), py::arg("lse"),
        py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"), py::arg("threads") = 1, py::arg("simd") = "",
        "Its gradients.");
  m.def("normalise", &normalise, py::arg("sizes"), py::arg("arrays"), py::arg("out"), py::arg("threads") = 1,
        py::arg("simd") = "", "pixels [B, H, W, 3] uint8, colours [B, 3, 4] double, sizes [B, 2] -> out [B, H, W, 3].");
  m.def("resize", &resize, py::arg("sizes"), py::arg("box"), py::arg("flips"), py::arg("pixels"), py::arg("out"),
        py::arg("simd") = "", "Part of a picture [H, W, 3] uint8 resized as by Pillow's bilinear filter, then mirrored.");
  py::class_<dndetr::SetLoss>(m, "SetLoss", "Inputs of the set loss; whoever makes one keeps them alive.")
      .def(py::init(&set_loss_problem), py::arg("sizes"), py::arg("logits"), py::arg("boxes"), py::arg("others"),
           py::arg("weights"), py::arg("kinds"));
  m.def("set_loss", &set_loss, py::arg("problem"), py::arg("total"), py::arg("parts"), py::arg("threads") = 1,
        py::arg("simd") = "", "Class, L1 and GIoU losses: -> total, parts [Y, 6].");
  m.def("set_loss_backward", &set_loss_backward, py::arg("problem"), py::arg("grad_total"), py::arg("grad_parts"),
        py::arg("grad_logits"), py::arg("grad_boxes"), py::arg("threads") = 1, py::arg("simd") = "",
        "Gradients of logits and boxes; those of total and parts are given, or 0.");
  m.def("conv3x3_workspace", &conv3x3_workspace, py::arg("sizes"), py::arg("threads") = 1, py::arg("simd") = "",
        "Numbers of workspace for a 3x3 convolution and for its gradients of input and weight.");
  m.def("conv3x3", &launch<dndetr::conv3x3, conv3x3_problem, Conv3x3Sizes, 5>, py::arg("sizes"), py::arg("arrays"),
        py::arg("threads") = 1, py::arg("simd") = "",
        "x [B, H, W, inputs], weight [outputs, 3, 3, inputs], bias -> out [B, H, W, outputs]; workspace.");
  m.def("conv3x3_grad_input", &launch<dndetr::conv3x3_grad_input, conv3x3_problem, Conv3x3Sizes, 4>, py::arg("sizes"),
        py::arg("arrays"), py::arg("threads") = 1, py::arg("simd") = "", "grad_out, weight -> grad_x; workspace.");
  m.def("conv3x3_grad_weight", &launch<dndetr::conv3x3_grad_weight, conv3x3_problem, Conv3x3Sizes, 4>, py::arg("sizes"),
        py::arg("arrays"), py::arg("threads") = 1, py::arg("simd") = "", "x, grad_out -> grad_weight; workspace.");
  m.def("weight_gradients_workspace", &weight_gradients_workspace, py::arg("sizes"), py::arg("threads") = 1,
        py::arg("simd") = "", "Numbers of workspace for a linear layer's gradients of weight and bias.");
  m.def("weight_gradients", &launch<dndetr::weight_gradients, weight_gradients_problem, WeightGradientSizes, 5>,
        py::arg("sizes"), py::arg("arrays"), py::arg("threads") = 1, py::arg("simd") = "",
        "grad_out, x -> grad_weight, grad_bias; workspace.");
}
