// Compiles the CPU kernels for three instruction sets and selects one at run time.
//
// One binary serves every x86-64 machine: the kernels are compiled with AVX-512, with AVX2 and for any processor.
// Other architectures have only the last variant, with 16-byte vectors (such as NEON).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "deform_attn.h"

struct Bfloat16 {
  uint16_t bits;
};

// Kernels for one type of values; see cpu_forward.h, cpu_backward.h and cpu_points.h.
struct CpuKernels {
  void (*forward)(const DeformAttnProblem&, const DeformAttnInputs&, void* output, int64_t begin, int64_t end);
  void (*prepare)(const DeformAttnProblem&, const DeformAttnInputs&, void* locations, void* weights, int64_t begin,
                  int64_t end);
  void (*backward)(const DeformAttnProblem&, const DeformAttnInputs&, const void* grad_output,
                   const DeformAttnGradients&, int64_t begin, int64_t end);
  void (*finish)(const DeformAttnProblem&, const DeformAttnInputs&, const void* weights, const void* grad_locations,
                 const void* grad_weights, const DeformAttnGradients&, int64_t begin, int64_t end);
};

#pragma GCC diagnostic ignored "-Wpsabi"  // no function with external linkage takes vectors

#define VG_ISA baseline
#define VG_VECTOR_BYTES 16
#include "cpu_kernels.h"
#undef VG_ISA
#undef VG_VECTOR_BYTES

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define VG_ISA avx2
#define VG_VECTOR_BYTES 32
#include "cpu_kernels.h"
#undef VG_ISA
#undef VG_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#define VG_ISA avx512
#define VG_VECTOR_BYTES 64
#include "cpu_kernels.h"
#undef VG_ISA
#undef VG_VECTOR_BYTES
#pragma GCC pop_options
#endif

static inline CpuKernels cpu_kernels(int32_t dtype) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    return avx512::kernels(dtype);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels(dtype);
#endif
  return baseline::kernels(dtype);
}
