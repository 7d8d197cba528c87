// Operations of one lane of a warp: exchange values within its group, add atomically.
//
// They exist for the GPU and, with VG_EMULATE, for the host, so each kernel is written once.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#ifdef VG_EMULATE
#include "cuda_emulation.h"
#define VG_DEVICE inline
#define VG_KERNEL(blocks) inline
#define VG_PARAMETER
#define VG_UNROLL
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define VG_DEVICE __device__ __forceinline__
// blocks: minimum number of resident blocks on a multiprocessor, which limits the registers
#define VG_KERNEL(blocks) __global__ __launch_bounds__(kThreads, blocks)
#define VG_PARAMETER __grid_constant__
#define VG_UNROLL _Pragma("unroll")
#endif

namespace {

constexpr int kThreads = 256;  // per block
constexpr unsigned kWholeWarp = 0xffffffffu;

// ---- indices, and exchange between lanes ---------------------------------------------------------------------------

#ifdef VG_EMULATE
VG_DEVICE int thread_of_block() { return emulation::position().thread + emulation::warp().lane(); }
VG_DEVICE int block_of_grid() { return emulation::position().block; }
VG_DEVICE int blocks_of_grid() { return emulation::position().blocks; }
#else
VG_DEVICE int thread_of_block() { return threadIdx.x; }
VG_DEVICE int block_of_grid() { return blockIdx.x; }
VG_DEVICE int blocks_of_grid() { return gridDim.x; }
#endif

VG_DEVICE int64_t thread_of_grid() { return static_cast<int64_t>(block_of_grid()) * kThreads + thread_of_block(); }
VG_DEVICE int64_t threads_of_grid() { return static_cast<int64_t>(blocks_of_grid()) * kThreads; }

// Returns the value of lane `source` (0 .. GROUP - 1) of this lane's group of GROUP neighboring lanes. All lanes of the
// warp must call this function, and the next three, together; the emulation checks this by the `line` of the call.
template <int GROUP, typename T>
VG_DEVICE T from_lane(T mine, int source, int line = __builtin_LINE()) {
#ifdef VG_EMULATE
  const int lane = emulation::warp().lane();
  return emulation::warp().exchange(mine, lane - lane % GROUP + source, line);
#else
  return __shfl_sync(kWholeWarp, mine, source, GROUP);
#endif
}

template <int GROUP, typename T>
VG_DEVICE T group_sum(T x, int line = __builtin_LINE()) {
  const int lane = thread_of_block() % GROUP;
  VG_UNROLL
  for (int step = 1; step < GROUP; step *= 2) x += from_lane<GROUP>(x, lane ^ step, line);
  return x;
}

template <int GROUP, typename T>
VG_DEVICE T group_max(T x, int line = __builtin_LINE()) {
  const int lane = thread_of_block() % GROUP;
  VG_UNROLL
  for (int step = 1; step < GROUP; step *= 2) {
    const T other = from_lane<GROUP>(x, lane ^ step, line);
    x = x < other ? other : x;
  }
  return x;
}

VG_DEVICE bool all_of_warp(bool mine, int line = __builtin_LINE()) {
#ifdef VG_EMULATE
  return emulation::warp().all(mine, line);
#else
  return __all_sync(kWholeWarp, mine);
#endif
}

// ---- atomic additions ---------------------------------------------------------------------------------------------

template <typename T>
VG_DEVICE void add_shared(T* to, T x) {
#ifdef VG_EMULATE
  *to += x;
#else
  atomicAdd(to, x);
#endif
}

// Adds four values in one transaction on sm_90 and later: a quarter of the instructions.
VG_DEVICE void add_shared_four(float* to, const float* x) {
#if !defined(VG_EMULATE) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(x[0]),
               "f"(x[1]), "f"(x[2]), "f"(x[3]));
#else
  VG_UNROLL
  for (int i = 0; i < 4; ++i) add_shared(to + i, x[i]);
#endif
}

VG_DEVICE void max_shared(uint32_t* to, uint32_t x) {
#ifdef VG_EMULATE
  if (*to < x) *to = x;
#else
  atomicMax(to, x);
#endif
}

}  // namespace
