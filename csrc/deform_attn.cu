// Launches the kernels of multi-scale deformable attention: selects the division of work, checks the limits of the
// kernels and divides scratch memory. With VG_EMULATE the same launchers run the same kernels on the host.
#include "deform_attn.h"

#include <limits.h>

#include "cuda_backward.h"
#include "cuda_forward.h"
#include "cuda_lanes.h"

namespace {

// Negative, because CUDA errors are positive.
enum Failure { kNone = 0, kLevelTooLarge = -1, kTooManyRows = -2, kUnknownDtype = -3 };

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, void* stream, Arguments... arguments) {
  if (blocks == 0) return kNone;
  if (blocks > INT_MAX) return kTooManyRows;
  const int grid = static_cast<int>(blocks);
#ifdef VG_EMULATE
  (void)stream;
  emulation::launch(grid, kThreads, [=] { kernel(arguments...); });
  return kNone;
#else
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
#endif
}

int zero(void* memory, int64_t bytes, void* stream) {
#ifdef VG_EMULATE
  (void)stream;
  memset(memory, 0, bytes);
  return kNone;
#else
  return cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
#endif
}

int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

// Element-wise kernels loop, so more blocks than fill a GPU several times bring nothing.
int64_t blocks_for_elements(int64_t count) { return count < (1 << 20) ? blocks_for(count) : (1 << 20) / kThreads; }

// Blocks that process `positions` queries of every head and batch element at once; see block_part().
template <typename C>
int64_t blocks_for_rows(const DeformAttnProblem& problem, int64_t positions) {
  return problem.batch * problem.heads * blocks_for(positions * C::GROUP);
}

int64_t rows_of(const DeformAttnProblem& problem) { return problem.batch * problem.queries * problem.heads; }

int64_t points_of(const DeformAttnProblem& problem) { return rows_of(problem) * problem.levels * problem.points; }

int64_t values_of(const DeformAttnProblem& problem) {
  return problem.batch * problem.tokens * problem.heads * problem.channels;
}

// ---- limits of the kernels ----------------------------------------------------------------------------------------

// Indices of rows and tokens of a batch element and pixel offsets within a level are 32-bit, all others 64-bit.
int check(const DeformAttnProblem& problem) {
  if (problem.value_dtype < kFloat64 || problem.value_dtype > kBFloat16) return kUnknownDtype;
  if (problem.queries * problem.heads > INT_MAX / 32) return kTooManyRows;
  if (problem.tokens > INT_MAX / 32) return kLevelTooLarge;  // see Point
  const int64_t dense = static_cast<int64_t>(problem.heads) * problem.channels;
  const int64_t token = problem.value_token_stride < dense ? dense : problem.value_token_stride;
  for (int level = 0; level < problem.levels; ++level) {
    // One row and pixel more than exist: the offset of a corner above and left of the first pixel must not overflow.
    const int64_t height = problem.level[level].height + 1, width = problem.level[level].width + 2;
    if (height * width * token > INT_MAX) return kLevelTooLarge;
  }
  return kNone;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether value and the output can be loaded and stored 16 bytes at a time.
bool vectors_fit(const DeformAttnProblem& problem, int vector, const DeformAttnInputs& inputs, const void* output) {
  return problem.channels % vector == 0 && problem.value_batch_stride % vector == 0 &&
         problem.value_token_stride % vector == 0 && problem.value_head_stride % vector == 0 && aligned(inputs.value) &&
         aligned(output);
}

// Whether the kernel for the sizes of most published detectors (4 levels, 4 points, 32 channels) can be used. It has no
// deterministic variant: one more variant of the largest kernels would take long to compile, for a mode that is slow.
bool exact_fits(
    const DeformAttnProblem& problem, const DeformAttnInputs& inputs, const DeformAttnGradients& gradients) {
  return !problem.deterministic && problem.channels == 32 && problem.levels == 4 && problem.points == 4 &&
         aligned(inputs.locations) && aligned(inputs.weights) && aligned(inputs.offsets) && aligned(inputs.logits) &&
         aligned(gradients.locations) && aligned(gradients.weights) && aligned(gradients.offsets) &&
         aligned(gradients.logits);
}

// Calls run(Cut) with the fastest division of work for the problem.
template <typename T, bool FUSED, typename Run>
int with_cut_of(
    const DeformAttnProblem& problem, const DeformAttnInputs& inputs, const void* output,
    const DeformAttnGradients& gradients, const Run& run) {
  if constexpr (sizeof(T) < 8) {
    constexpr int VECTOR = 16 / sizeof(T), GROUP = 32 / VECTOR;
    if (vectors_fit(problem, VECTOR, inputs, output) && aligned(gradients.value)) {
      if (exact_fits(problem, inputs, gradients)) return run(Cut<T, VECTOR, GROUP, 4, 4, FUSED>());
      return run(Cut<T, VECTOR, GROUP, 0, 0, FUSED>());
    }
  }
  return run(Cut<T, 1, 8, 0, 0, FUSED>());
}

template <typename Run>
int with_cut(
    const DeformAttnProblem& problem, const DeformAttnInputs& inputs, const void* output,
    const DeformAttnGradients& gradients, const Run& run) {
  const auto with_dtype = [&](auto example) {
    using T = decltype(example);
    return problem.reference_size ? with_cut_of<T, true>(problem, inputs, output, gradients, run)
                                  : with_cut_of<T, false>(problem, inputs, output, gradients, run);
  };
  switch (problem.value_dtype) {
    case kFloat64: return with_dtype(double());
    case kFloat32: return with_dtype(float());
    case kFloat16: return with_dtype(Half());
    default: return with_dtype(BFloat());
  }
}

// ---- scratch memory of the backward pass --------------------------------------------------------------------------

// Offsets into the workspace; a buffer of 0 bytes is not needed.
struct Workspace {
  int64_t value_sums_bytes, limits, locations, weights, bytes;
  bool fixed_point, needs_locations, needs_weights;
};

Workspace plan(const DeformAttnProblem& problem, const DeformAttnGradients& gradients) {
  const bool halves = problem.value_dtype == kFloat16 || problem.value_dtype == kBFloat16;
  const int64_t sum_bytes = problem.value_dtype == kFloat64 ? 8 : 4;
  Workspace workspace{};
  workspace.fixed_point = gradients.value && problem.deterministic && problem.value_dtype != kFloat64;
  workspace.needs_locations = gradients.reference != nullptr;
  // If gradients of logits have the dtype of sums, the kernel stores intermediate results in their memory.
  workspace.needs_weights = gradients.logits && halves && problem.query_dtype == problem.value_dtype;
  const auto reserve = [&](bool wanted, int64_t bytes) {
    const int64_t start = workspace.bytes;
    if (wanted) workspace.bytes += (bytes + 255) / 256 * 256;
    return start;
  };
  if (workspace.fixed_point) {
    workspace.value_sums_bytes = 8 * values_of(problem);
  } else if (gradients.value && halves) {
    workspace.value_sums_bytes = (values_of(problem) + 31) / 32 * 128;  // whole 32, see first_four()
  }
  reserve(true, workspace.value_sums_bytes);
  workspace.limits = reserve(workspace.fixed_point, sizeof(Limits));
  workspace.locations = reserve(workspace.needs_locations, 2 * sum_bytes * points_of(problem));
  workspace.weights = reserve(workspace.needs_weights, sum_bytes * points_of(problem));
  return workspace;
}

// ---- backward, step by step ---------------------------------------------------------------------------------------

struct BackwardCall {
  const DeformAttnProblem& problem;
  const DeformAttnInputs& inputs;
  const void* grad_output;
  const DeformAttnGradients& gradients;
  Workspace plan;
  char* workspace;
  void* stream;

  Limits* limits() const { return reinterpret_cast<Limits*>(workspace + plan.limits); }
  void* value_sums() const { return plan.value_sums_bytes ? workspace : gradients.value; }

  // Sums start from 0; the fixed-point scale must be known before the first addition.
  template <typename T>
  int prepare() const {
    if (!gradients.value) return kNone;
    const int64_t value_bytes = values_of(problem) * static_cast<int64_t>(sizeof(T));
    int failure = zero(value_sums(), plan.value_sums_bytes ? plan.value_sums_bytes : value_bytes, stream);
    if (failure || !plan.fixed_point) return failure;
    failure = zero(limits(), sizeof(Limits), stream);
    if (failure) return failure;
    return launch(
        limits_kernel<T>, blocks_for_elements(rows_of(problem) * problem.channels), stream, problem, grad_output,
        inputs.weights, limits());
  }

  template <typename C>
  int rows() const {
    using A = typename C::Sum;
    A* weights = reinterpret_cast<A*>(plan.needs_weights ? workspace + plan.weights : gradients.logits);
    A* locations = reinterpret_cast<A*>(plan.needs_locations ? workspace + plan.locations : nullptr);
    const Scratch<A> scratch{value_sums(), limits(), locations, weights};
    const auto* grad = static_cast<const typename C::Value*>(grad_output);
    const bool in_order = problem.deterministic && !plan.fixed_point && gradients.value;
    if (rows_of(problem) == 0) return kNone;
    const int at_once = in_order ? 1 : static_cast<int>(problem.queries);
    const int64_t blocks = blocks_for_rows<C>(problem, at_once);
    if constexpr (sizeof(A) < 8 && !C::EXACT) {
      if (plan.fixed_point) {
        return launch(
            backward_kernel<C, true>, blocks, stream, problem, inputs, grad, gradients, scratch, at_once);
      }
    }
    return launch(
        backward_kernel<C, false>, blocks, stream, problem, inputs, grad, gradients, scratch, at_once);
  }

  template <typename C>
  int finish_value() const {
    using T = typename C::Value;
    T* grad_value = static_cast<T*>(gradients.value);
    const int64_t count = values_of(problem);
    if constexpr (sizeof(T) < 8) {
      if (plan.fixed_point) {
        return launch(
            finish_fixed_point_kernel<T>, blocks_for_elements(count), stream, problem,
            reinterpret_cast<const long long*>(workspace), limits(), count, grad_value);
      }
    }
    if constexpr (kHalfPrecision<T>) {
      return launch(
          round_sums_kernel<T, C::VECTOR>, blocks_for_elements(count / C::VECTOR), stream,
          reinterpret_cast<const float*>(workspace), count, grad_value);
    }
    return kNone;
  }

  template <typename C>
  int finish() const {
    using A = typename C::Sum;
    if (gradients.value && plan.value_sums_bytes) {
      const int failure = finish_value<C>();
      if (failure) return failure;
    }
    if (!gradients.reference) return kNone;
    const int64_t references = problem.batch * problem.queries * problem.reference_levels;
    return launch(
        reference_kernel<A, typename C::Value>, blocks_for_elements(references), stream, problem, inputs,
        reinterpret_cast<const A*>(workspace + plan.locations), static_cast<A*>(gradients.reference));
  }
};

}  // namespace

// ---- functions of deform_attn.h -----------------------------------------------------------------------------------

int deform_attn_cuda_forward(
    const DeformAttnProblem* problem, const DeformAttnInputs* inputs, void* output, void* stream) {
  const int failure = check(*problem);
  if (failure) return failure;
  return with_cut(*problem, *inputs, output, DeformAttnGradients{}, [&](auto cut) {
    using C = decltype(cut);
    return launch(
        forward_kernel<C>, blocks_for_rows<C>(*problem, problem->queries), stream, *problem, *inputs,
        static_cast<typename C::Value*>(output));
  });
}

int64_t deform_attn_cuda_backward_workspace(const DeformAttnProblem* problem, const DeformAttnGradients* gradients) {
  return plan(*problem, *gradients).bytes;
}

int deform_attn_cuda_backward(
    const DeformAttnProblem* problem, const DeformAttnInputs* inputs, const void* grad_output,
    const DeformAttnGradients* gradients, void* workspace, void* stream) {
  int failure = check(*problem);
  if (failure) return failure;
  const BackwardCall call{*problem,         *inputs, grad_output, *gradients, plan(*problem, *gradients),
                          static_cast<char*>(workspace), stream};
  return with_cut(*problem, *inputs, grad_output, *gradients, [&](auto cut) {
    using C = decltype(cut);
    failure = call.prepare<typename C::Value>();
    if (!failure) failure = call.rows<C>();
    if (!failure) failure = call.finish<C>();
    return failure;
  });
}

#ifndef VG_EMULATE
__global__ void probe_kernel() {}

int deform_attn_cuda_probe() {
  constexpr int architectures[] = {__CUDA_ARCH_LIST__};  // in ascending order, 900 for sm_90
  int count = 0;
  cudaError_t failure = cudaGetDeviceCount(&count);
  for (int device = 0; !failure && device < count; ++device) {
    int major = 0, minor = 0;
    failure = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!failure) failure = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (!failure && 100 * major + 10 * minor < architectures[0]) failure = cudaErrorNoKernelImageForDevice;
  }
  if (failure) return failure;
  probe_kernel<<<1, 1>>>();
  failure = cudaGetLastError();
  return failure ? failure : cudaDeviceSynchronize();
}
#endif

const char* deform_attn_cuda_error(int code) {
  switch (code) {
    case kNone: return "no error";
    case kLevelTooLarge: return "value has more than 2^26 tokens, or a level more than 2^31 elements in memory";
    case kTooManyRows: return "queries times heads is more than 2^26, or there are more than 2^31 blocks of rows";
    case kUnknownDtype: return "the kernels do not support the dtype of value";
  }
#ifdef VG_EMULATE
  return "unknown error";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}
