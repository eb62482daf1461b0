// What the bindings call: launchers that take raw pointers, sizes and strides (in elements), and never see torch.
#pragma once

#include <array>
#include <cstdint>

namespace dndetr {

enum class Simd { plain = 0, avx2 = 1, avx512 = 2 };

// The widest instruction set of this machine that the build has code for.
Simd best_simd();

// Where a CUDA launcher puts its work: the tensors' device, and a cudaStream_t of it.
struct Stream {
  int device;
  void* handle;
};

enum class Dtype { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

struct Array {
  void* data;
  Dtype dtype;
};

// cost[m * problem_stride + q * query_stride + t * target_stride], float or double; counts[problems];
// query_of[problems * targets], contiguous.
struct AssignProblems {
  const void* cost;
  bool is_double;
  int problems, queries, targets;
  std::int64_t problem_stride, query_stride, target_stride;
  const std::int32_t* counts;
  std::int32_t* query_of;
};

void assign(const AssignProblems& problems, int threads, Simd simd);

template <class Real>
struct CostWeights {
  Real label, l1, giou, alpha, position;

  template <class To>
  CostWeights<To> as() const {
    return {static_cast<To>(label), static_cast<To>(l1), static_cast<To>(giou), static_cast<To>(alpha),
            static_cast<To>(position)};
  }
};

struct Strides {
  std::int64_t layer, image, query;
};

// What a matching cost is made of. Costs are double for float64 logits, else float.
struct MatchInputs {
  int layers, batch, queries, classes, slots;
  Array logits, boxes;                                   // [Y, B, N, K] and [Y, B, N, 4], the last dimension contiguous
  Strides logits_strides, boxes_strides;
  const std::int64_t* labels;                            // [B, T]
  Array target_boxes;                                    // [B, T, 4]
  const std::int32_t* counts;                            // [B]
  CostWeights<double> weights;

  int targets_of(int image) const { return counts[image] < 0 ? 0 : counts[image] > slots ? slots : counts[image]; }
};

struct MatchOutputs {
  int sets;
  std::int32_t *query, *target;  // [Y, B, sets, T], [Y, B, N]
  bool* finite;                  // [Y, B, sets]
};

// cost [Y, B, T, N], infinite where padded.
void match_cost(const MatchInputs& inputs, void* cost, int threads, Simd simd);
void match(const MatchInputs& inputs, const MatchOutputs& outputs, int threads, Simd simd);

// The same on a GPU, up to 2048 queries (of a set) and targets, boxes of the type of the costs. `exact`: sums in double, as on the CPU, else in float for
// float costs. workspace: match_workspace() costs for each problem.
void assign_cuda(const AssignProblems& problems, bool exact, void* workspace, Stream stream);
void match_cuda(const MatchInputs& inputs, const MatchOutputs& outputs, bool exact, void* workspace, Stream stream);
std::int64_t match_workspace(int queries, int slots, bool is_double, Stream stream);

// Multi-scale deformable attention. Contiguous, except for value [B, S, H, D], whose width D alone must be.
struct DeformAttn {
  int batch, queries, heads, width, levels, points;
  int reference_width;  // 2 or 4: offsets and logits are given; 0: locations and weights in their place, no reference
  const int* shapes;    // height and width of each level
  Array value;
  std::int64_t batch_stride, pixel_stride, head_stride;
  Array reference, offsets, logits;             // [B, Q, L, 2 or 4], [B, Q, H, L, P, 2], [B, Q, H, L, P]
  std::int64_t offsets_stride, logits_stride;   // from a query to the next, images following each other
  const std::int64_t* valid_sizes;              // [B, L, 2] (height, width), or null: every pixel counts
};

// Gradients; `reference` is [B, H, Q, L, 2 or 4], each head's part apart, or null data where it is not wanted.
struct DeformAttnGrads {
  Array value, reference, offsets, logits;
  std::int64_t offsets_stride, logits_stride;
};

// out [B, Q, H, D]. Computed in double for float64 values, else in float.
void ms_deform_attn(const DeformAttn& problem, Array out, int threads, Simd simd);
void ms_deform_attn_backward(const DeformAttn& problem, Array grad_out, const DeformAttnGrads& grads, int threads,
                             Simd simd);

// The same on a GPU, computed in float: no float64, widths a multiple of 4, at most 8 levels and 8 points. Pointers and
// strides of value are aligned to 16 bytes (8 where a row of channels is no multiple of 16), those of grad_out too; those
// of offsets and their gradients to two elements.
void ms_deform_attn_cuda(const DeformAttn& problem, Array out, Stream stream);
// value and grads.value are contiguous; grads.value, zeroed, is float32 whatever the dtype of value. With `fixed_point`,
// one float in device memory, it is int64 and counts in units of its inverse: sums do not depend on their order.
void ms_deform_attn_backward_cuda(const DeformAttn& problem, Array grad_out, const DeformAttnGrads& grads,
                                  const float* fixed_point, Stream stream);

// An array [B, H, rows, width] whose rows are contiguous; strides in elements.
struct Heads {
  Array array;
  std::int64_t image, head, row;
};

// Softmax attention; all arrays have one dtype. Queries and keys have two parts, whose products are added; the second
// may be of width 0. The first groups * slots keys are each seen by the queries of their own group only, which are at
// the same places; the others are seen by all queries.
struct Attention {
  int batch, heads, queries, keys;
  int widths[2], value_width;
  Heads q[2], k[2], v;
  double scale;
  int groups, slots;
  const std::int32_t* active;  // [B] live slots of each group, or null: all; the others see and are seen by nobody
  const bool* valid;           // [B, S] keys that are seen at all, or null: all
};

struct AttentionGrads {
  Heads q[2], k[2], v;
};

// out [B, H, Q, value width] and lse [B, H, Q], the logarithm of each row's sum of exponentials, +inf for rows that see
// nothing, which give zeros. Computed in double for float64, else in float; lse has that type.
void attention(const Attention& problem, Heads out, void* lse, int threads, Simd simd);
void attention_backward(const Attention& problem, Heads grad_out, Heads out, const void* lse, const AttentionGrads& grads,
                        int threads, Simd simd);

// A 3x3 convolution of stride 1 or 2 with a border of one zero, in float32: x [B, H, W, inputs],
// weight [outputs, 3, 3, inputs], out [B, out_height, out_width, outputs], all contiguous and aligned to 64 bytes. Inputs and
// outputs are multiples of 32.
struct Conv3x3 {
  int batch, height, width, inputs, outputs, stride;

  int out_height() const { return (height + stride - 1) / stride; }
  int out_width() const { return (width + stride - 1) / stride; }
};

// Numbers that each function needs room for, aligned to 64 bytes.
struct Conv3x3Workspace {
  std::int64_t forward, grad_input, grad_weight;
};
Conv3x3Workspace conv3x3_workspace(const Conv3x3& problem, int threads, Simd simd);

// bias [outputs], or null.
void conv3x3(const Conv3x3& problem, float* x, const float* weight, const float* bias, float* out, float* workspace,
             int threads, Simd simd);
void conv3x3_grad_input(const Conv3x3& problem, float* grad_out, const float* weight, float* grad_x, float* workspace,
                        int threads, Simd simd);
void conv3x3_grad_weight(const Conv3x3& problem, float* x, float* grad_out, float* grad_weight, float* workspace,
                         int threads, Simd simd);

// Of a linear layer: x [rows, inputs], grad_out [rows, outputs], contiguous, in float32.
struct WeightGradients {
  std::int64_t rows;
  int inputs, outputs;
};

// Numbers of workspace, aligned to 64 bytes.
std::int64_t weight_gradients_workspace(const WeightGradients& problem, int threads, Simd simd);
// grad_weight [outputs, inputs] = grad_out^T x, grad_bias [outputs].
void weight_gradients(const WeightGradients& problem, const float* grad_out, const float* x, float* grad_weight,
                      float* grad_bias, float* workspace, int threads, Simd simd);

// Images as bytes: pixels [B, H, W, 3], colours [B, 3, 4], sizes [B, 2] valid (height, width), all contiguous.
struct Normalise {
  int batch, height, width;
  const std::uint8_t* pixels;
  const double* colours;
  const std::int64_t* sizes;
};

// out [B, H, W, 3]: computed in double for float64, else in float; zero beyond an image's size.
void normalise(const Normalise& problem, Array out, int threads, Simd simd);

// A part of a picture [height, width, 3], box (x0, y0, x1, y1) in its pixels, resized and then mirrored.
struct Resize {
  int height, width, new_height, new_width;
  std::array<float, 4> box;
  bool hflip, vflip;
};

// pixels -> out [new_height, new_width, 3], on the calling thread.
void resize(const Resize& problem, const std::uint8_t* pixels, std::uint8_t* out, Simd simd);

// Class losses, in the order of dndetr/ops/class_loss.py.
enum class ClassLoss { focal = 0, iou = 1, mal = 2, position = 3 };

// The set loss of all decoder layers; everything is contiguous, denoising queries come first. A group has per_object slots
// for each object, of which the first restores it; its first counted[image] slots have a class loss. The first `proposals`
// layers have no denoising queries that count. What is `void` is double where logits or boxes are, else float.
struct SetLoss {
  int layers, batch, queries, classes, objects, groups, per_object, proposals;
  Array logits, boxes;          // [Y, B, Q, K], [Y, B, Q, 4]
  const std::int32_t* target;   // [Y, B, Q - denoising()], -1 for none
  const std::int64_t* labels;   // [B, objects]
  const void* target_boxes;     // [B, objects, 4]
  const std::int32_t* counts;   // [B]
  const std::int32_t* counted;  // [B]
  const void* normalizers;      // [2]
  double label, l1, giou, alpha, eps;
  std::array<ClassLoss, 2> kinds;  // of matching and denoising queries

  int slots() const { return objects * per_object; }
  int denoising() const { return groups * slots(); }
};

// total, a scalar, and parts [Y, 6]; backwards their gradients, or null, and those of logits and boxes.
void set_loss(const SetLoss& problem, void* total, void* parts, int threads, Simd simd);
void set_loss_backward(const SetLoss& problem, const void* grad_total, const void* grad_parts, Array grad_logits,
                       Array grad_boxes, int threads, Simd simd);

}  // namespace dndetr
