// All CPU kernels of one instruction set and their table; included once per instruction set.

#include "cpu_vectors.h"

#include "cpu_points.h"

#include "cpu_forward.h"

#include "cpu_backward.h"

namespace VG_ISA {

template <typename T, typename A>
static CpuKernels kernels() {
  return {forward<T, A>, prepare<A>, backward<T, A>, finish<A>};
}

static inline CpuKernels kernels(int32_t dtype) {
  if (dtype == kFloat64) return kernels<double, double>();
  return dtype == kFloat32 ? kernels<float, float>() : kernels<Bfloat16, float>();
}

}  // namespace VG_ISA
