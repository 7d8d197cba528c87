// Torch bindings of deformable attention: registers kernels for the operators whose schemas vg/ops defines in Python.
//
// They use libtorch's stable ABI, so one binary works with many torch versions and compiles in seconds.
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "call.h"
#include "deform_attn.h"
#if defined(VG_WITH_CUDA) || defined(VG_EMULATE)
#define VG_LAUNCHERS 1  // use the kernels of deform_attn.cu
#else
#include "cpu_dispatch.h"
#endif

#if defined(VG_WITH_CUDA)
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

// The stable ABI does not expose torch.use_deterministic_algorithms. libtorch_cpu has had these two symbols since torch
// 1.7; if a future torch lacks them they are null, and the kernels are always deterministic.
namespace at {
class Context {
 public:
  __attribute__((weak)) bool deterministicAlgorithms() const;
};
__attribute__((weak)) Context& globalContext();
}  // namespace at

namespace {

// ---- the kernels of this build: CPU kernels or the launchers of deform_attn.cu -----------------------------------

#if !defined(VG_LAUNCHERS)
struct Kernels {
  static constexpr bool kCuda = false;

  static void forward(const Call& call, void* output) {
    const CpuKernels kernels = cpu_kernels(call.problem.value_dtype);
    torch::stable::parallel_for(0, call.rows(), 16, [&](int64_t begin, int64_t end) {
      kernels.forward(call.problem, call.inputs, output, begin, end);
    });
  }

  static void backward(const Call& call, const void* grad, const DeformAttnGradients& gradients) {
    if (!call.fused()) return backward_plain(call.problem, call.inputs, grad, gradients);
    // Tasks of all levels need softmax and locations, so these are computed once and stored.
    const CpuKernels kernels = cpu_kernels(call.problem.value_dtype);
    const DeformAttnProblem& p = call.problem;
    const Tensor locations = torch::stable::new_empty(call.queries[1], sizes_of(call.queries[1]));
    const Tensor weights = torch::stable::new_empty(call.queries[2], sizes_of(call.queries[2]));
    DeformAttnInputs inputs = call.inputs;
    inputs.locations = locations.const_data_ptr(), inputs.weights = weights.const_data_ptr();
    torch::stable::parallel_for(0, call.rows(), 64, [&](int64_t begin, int64_t end) {
      kernels.prepare(p, inputs, locations.mutable_data_ptr(), weights.mutable_data_ptr(), begin, end);
    });
    DeformAttnGradients plain{gradients.value, gradients.offsets, gradients.logits, nullptr, nullptr, nullptr};
    Tensor grad_locations = locations, only_for_reference = locations;
    if (gradients.reference && !gradients.offsets) {
      only_for_reference = torch::stable::new_empty(locations, sizes_of(locations));
      plain.locations = only_for_reference.mutable_data_ptr();
    }
    backward_plain(p, inputs, grad, plain);
    torch::stable::parallel_for(0, call.rows(), 64, [&](int64_t begin, int64_t end) {
      kernels.finish(p, inputs, inputs.weights, plain.locations, plain.weights, gradients, begin, end);
    });
  }

 private:
  static void backward_plain(const DeformAttnProblem& p, const DeformAttnInputs& inputs, const void* grad,
                             const DeformAttnGradients& gradients) {
    const CpuKernels kernels = cpu_kernels(p.value_dtype);
    const int64_t tasks = p.batch * p.heads * p.levels;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      kernels.backward(p, inputs, grad, gradients, begin, end);
    });
  }
};
#else
bool deterministic() { return !at::globalContext || at::globalContext().deterministicAlgorithms(); }

struct Kernels {
  static constexpr bool kCuda = true;

  static void check(int code) { STD_TORCH_CHECK(code == 0, "deform_attn: ", deform_attn_cuda_error(code)); }

#if defined(VG_WITH_CUDA)
  static void* stream(const Call& call) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(call.value.get_device_index(), &stream));
    return stream;
  }
#else
  static void* stream(const Call&) { return nullptr; }
#endif

  static void forward(const Call& call, void* output) {
    check(deform_attn_cuda_forward(&call.problem, &call.inputs, output, stream(call)));
  }

  static void backward(const Call& call, const void* grad, const DeformAttnGradients& gradients) {
    DeformAttnProblem problem = call.problem;
    problem.deterministic = deterministic();
    const int64_t bytes = deform_attn_cuda_backward_workspace(&problem, &gradients);
    const Tensor workspace = torch::stable::new_empty(call.value, Sizes{bytes}, ScalarType::Byte);
    check(deform_attn_cuda_backward(
        &problem, &call.inputs, grad, &gradients, bytes ? workspace.mutable_data_ptr() : nullptr, stream(call)));
  }
};
#endif

// ---- the operators ----------------------------------------------------------------------------------------------

Tensor run_forward(const Tensor& value, const Sizes& shapes, const std::vector<Tensor>& queries) {
#if defined(VG_WITH_CUDA)
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
#endif
  const Call call(value, shapes, queries, Kernels::kCuda);
  const Tensor output = torch::stable::new_empty(call.value, call.output_sizes());
  if (output.numel() > 0) Kernels::forward(call, output.mutable_data_ptr());
  return as(output, value.scalar_type());
}

std::vector<Tensor> run_backward(const Tensor& grad, const Tensor& value, const Sizes& shapes,
                                 const std::vector<Tensor>& queries, const Needs& needs) {
#if defined(VG_WITH_CUDA)
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
#endif
  const Call call(value, shapes, queries, Kernels::kCuda);
  const Gradients gradients(call, needs);
  Tensor output_gradient = contiguous_as(grad, call.value.scalar_type());  // [B, Q, H * D]
  if (Kernels::kCuda) output_gradient = aligned(output_gradient);
  check_sizes(output_gradient, call.output_sizes(), "the gradient");
  Kernels::backward(call, output_gradient.const_data_ptr(), gradients.pointers);
  std::vector<Tensor> results;
  for (size_t i = 0; i < needs.size(); ++i)
    results.push_back(as(gradients.tensors[i], (i == 0 ? value : queries[i - 1]).scalar_type()));
  return results;
}

Tensor deform_attn(Tensor value, Sizes shapes, Tensor locations, Tensor weights) {
  return run_forward(value, shapes, {locations, weights});
}

std::tuple<Tensor, Tensor, Tensor> deform_attn_backward(
    Tensor grad, Tensor value, Sizes shapes, Tensor locations, Tensor weights, Needs needs) {
  const auto found = run_backward(grad, value, shapes, {locations, weights}, needs);
  return {found[0], found[1], found[2]};
}

Tensor deform_attn_fused(Tensor value, Sizes shapes, Tensor reference_points, Tensor offsets, Tensor logits) {
  return run_forward(value, shapes, {reference_points, offsets, logits});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_attn_fused_backward(
    Tensor grad, Tensor value, Sizes shapes, Tensor reference_points, Tensor offsets, Tensor logits, Needs needs) {
  const auto found = run_backward(grad, value, shapes, {reference_points, offsets, logits}, needs);
  return {found[0], found[1], found[2], found[3]};
}

}  // namespace

// Registers the kernels and returns null, or returns why they do not run on this machine. Not a static initializer like
// STABLE_TORCH_LIBRARY_IMPL, because registered kernels replace the PyTorch implementation for good.
extern "C" const char* deform_attn_register() {
#if defined(VG_WITH_CUDA)
  if (const int code = deform_attn_cuda_probe()) return deform_attn_cuda_error(code);
  const char* device = "CUDA";
#else
  const char* device = "CPU";
#endif
  using torch::stable::detail::StableLibrary;
  static StableLibrary library(StableLibrary::Kind::IMPL, "vg", device, __FILE__, __LINE__);
  static const bool registered = [] {
    library.impl("deform_attn", TORCH_BOX(&deform_attn));
    library.impl("deform_attn_backward", TORCH_BOX(&deform_attn_backward));
    library.impl("deform_attn_fused", TORCH_BOX(&deform_attn_fused));
    library.impl("deform_attn_fused_backward", TORCH_BOX(&deform_attn_fused_backward));
    return true;
  }();
  (void)registered;
  return nullptr;
}
