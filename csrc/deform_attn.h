// The C interface between the torch bindings (deform_attn.cpp) and the CUDA kernels (deform_attn.cu).
//
// Legend: B batch, S image tokens of all levels, Q queries, H heads, D channels per head, L levels, P points per level.
// It does not depend on torch, so the .cu file compiles in seconds, also as C++ (VG_EMULATE).
//
// Three libraries are built from these sources:
//   CPU     g++ deform_attn.cpp
//   CUDA    g++ -DVG_WITH_CUDA deform_attn.cpp, linked with nvcc's object of deform_attn.cu
//   emulate g++ -DVG_EMULATE deform_attn.cpp and g++ -x c++ -DVG_EMULATE deform_attn.cu: the launchers below run on
//           host memory and replace the CPU kernels in the dispatcher, so the tests cover the CUDA kernels.
#pragma once

#include <stdint.h>

enum { kDeformAttnMaxLevels = 16 };

typedef enum { kFloat64 = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 } DeformAttnDtype;

typedef struct {
  int32_t height, width;  // 0 x 0 is an empty level: it contributes nothing
  int64_t start;          // first token of the level
} DeformAttnLevel;

// Sizes and layout of one call; small enough to be a kernel argument by value.
typedef struct {
  int64_t batch, tokens, queries;
  int32_t heads, channels, levels, points;
  DeformAttnLevel level[kDeformAttnMaxLevels];

  // "accumulate dtype" below: float64 when value_dtype is float64, else float32.
  int32_t value_dtype;  // of value, output, grad_output and grad_value
  int32_t query_dtype;  // of weights, or of offsets and logits, and of their gradients: accumulate dtype or value_dtype

  // Strides of value in elements; its last dimension is contiguous. The other inputs except reference are contiguous.
  int64_t value_batch_stride, value_token_stride, value_head_stride;

  // Fused form only; reference_size = 0 means the plain form (locations and weights).
  int32_t reference_size;    // 2: (x, y); 4: (center x, center y, width, height)
  int32_t reference_levels;  // 1 or L, 1 means that all levels share the reference
  int64_t reference_batch_stride, reference_query_stride, reference_level_stride;  // last dimension contiguous

  int32_t deterministic;  // 1: equal inputs give equal bits for every schedule
} DeformAttnProblem;

// Device pointers; those of the other form are null.
typedef struct {
  const void* value;      // [B, S, H, D] value_dtype
  const void* locations;  // plain: [B, Q, H, L, P, 2] accumulate dtype, (x, y) in 0..1
  const void* weights;    // plain: [B, Q, H, L, P] query_dtype
  const void* reference;  // fused: [B, Q, 1 or L, 2 or 4] accumulate dtype
  const void* offsets;    // fused: [B, Q, H, L, P, 2] query_dtype
  const void* logits;     // fused: [B, Q, H, L * P] query_dtype
} DeformAttnInputs;

// Outputs of backward, contiguous and uninitialized; null if not needed. Shapes and dtypes are those of the inputs.
typedef struct {
  void* value;
  void* locations;
  void* weights;
  void* reference;
  void* offsets;
  void* logits;
} DeformAttnGradients;

#ifdef __cplusplus
extern "C" {
#endif

// Launchers return 0 or an error code (see deform_attn_cuda_error()). They run on the current device and
// never synchronize. The stream is a cudaStream_t. Nothing is launched for zero queries or zero batch; grad_value is
// then still zeroed. output and grad_output: [B, Q, H * D] value_dtype, contiguous.
int deform_attn_cuda_forward(
    const DeformAttnProblem* problem, const DeformAttnInputs* inputs, void* output, void* stream);

// Bytes of scratch memory that backward needs (for example float32 sums of grad_value); may be 0.
int64_t deform_attn_cuda_backward_workspace(const DeformAttnProblem* problem, const DeformAttnGradients* gradients);

// workspace: uninitialized, aligned to 256 bytes, may be null if its size is 0. Its size depends on `gradients`, which
// must be the same in both calls.
int deform_attn_cuda_backward(
    const DeformAttnProblem* problem, const DeformAttnInputs* inputs, const void* grad_output,
    const DeformAttnGradients* gradients, void* workspace, void* stream);

// Returns 0 if these kernels run on the current device and no visible device is older than all architectures they were
// compiled for. It launches an empty kernel and synchronizes: GPUs and drivers that are too old differ in how they fail.
int deform_attn_cuda_probe(void);

const char* deform_attn_cuda_error(int code);

#ifdef __cplusplus
}
#endif
