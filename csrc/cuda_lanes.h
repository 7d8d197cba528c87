// Operations of one lane of a warp: exchange values within its group, move 16 bytes at once, add atomically.
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

// Storage of half-precision values; all arithmetic is float32.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// ---- indices, and exchange between lanes ---------------------------------------------------------------------------

#ifdef VG_EMULATE
VG_DEVICE int thread_of_block() { return emulation::position().thread + emulation::warp().lane(); }
VG_DEVICE int block_x() { return emulation::position().block_x; }
VG_DEVICE int block_y() { return emulation::position().block_y; }
VG_DEVICE int blocks_x() { return emulation::position().blocks_x; }
VG_DEVICE int blocks_y() { return emulation::position().blocks_y; }
#else
VG_DEVICE int thread_of_block() { return threadIdx.x; }
VG_DEVICE int block_x() { return blockIdx.x; }
VG_DEVICE int block_y() { return blockIdx.y; }
VG_DEVICE int blocks_x() { return gridDim.x; }
VG_DEVICE int blocks_y() { return gridDim.y; }
#endif

VG_DEVICE int64_t thread_of_grid() { return static_cast<int64_t>(block_x()) * kThreads + thread_of_block(); }
VG_DEVICE int64_t threads_of_grid() { return static_cast<int64_t>(blocks_x()) * kThreads; }

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

// ---- loads, stores and conversions --------------------------------------------------------------------------------

// NaN is a special case because rounding up would carry into the exponent.
inline uint16_t rounded_to_bfloat(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float widened_from_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  float x;
  if (exponent == 31) {
    x = fraction ? NAN : INFINITY;
  } else {  // subnormal: exponent 0 means 1, without the leading bit
    x = ldexpf(exponent ? fraction + 1024 : fraction, (exponent ? exponent : 1) - 25);
  }
  return bits & 0x8000 ? -x : x;
}

inline uint16_t rounded_to_half(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  if (x != x) return static_cast<uint16_t>(sign | 0x7e00);
  x = fabsf(x);
  if (x >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent = -14;
  if (x >= ldexpf(1, -14)) exponent = ilogbf(x);
  // Fractions are multiples of 2^(exponent - 10); rounding up to 2048 carries into the exponent, which is correct.
  const int fraction = static_cast<int>(rintf(ldexpf(x, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + fraction));
}

VG_DEVICE float bits_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

VG_DEVICE uint32_t float_as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

VG_DEVICE double widen(double x) { return x; }
VG_DEVICE float widen(float x) { return x; }
VG_DEVICE float widen(BFloat x) { return bits_as_float(static_cast<uint32_t>(x.bits) << 16); }
VG_DEVICE float widen(Half x) {
#ifdef VG_EMULATE
  return widened_from_half(x.bits);
#else
  return __half2float(__ushort_as_half(x.bits));
#endif
}

VG_DEVICE void narrow(double x, double* to) { *to = x; }
VG_DEVICE void narrow(float x, float* to) { *to = x; }
VG_DEVICE void narrow(float x, BFloat* to) {
#ifdef VG_EMULATE
  to->bits = rounded_to_bfloat(float_as_bits(x));
#else
  to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#endif
}
VG_DEVICE void narrow(float x, Half* to) {
#ifdef VG_EMULATE
  to->bits = rounded_to_half(x);
#else
  to->bits = __half_as_ushort(__float2half_rn(x));
#endif
}

// Two half-precision numbers of a 32-bit word. The compiler does not find the single instruction that each takes.
VG_DEVICE void widen_pair(uint32_t word, float* to, BFloat) {
  to[0] = bits_as_float(word << 16);
  to[1] = bits_as_float(word & 0xffff0000u);
}
VG_DEVICE void widen_pair(uint32_t word, float* to, Half) {
#ifdef VG_EMULATE
  to[0] = widened_from_half(static_cast<uint16_t>(word));
  to[1] = widened_from_half(static_cast<uint16_t>(word >> 16));
#else
  __half2 pair;
  memcpy(&pair, &word, sizeof pair);
  to[0] = __low2float(pair);
  to[1] = __high2float(pair);
#endif
}

VG_DEVICE uint32_t narrow_pair(const float* from, BFloat) {
#ifdef VG_EMULATE
  return rounded_to_bfloat(float_as_bits(from[0])) | rounded_to_bfloat(float_as_bits(from[1])) << 16;
#else
  const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
#endif
}
VG_DEVICE uint32_t narrow_pair(const float* from, Half) {
#ifdef VG_EMULATE
  return rounded_to_half(from[0]) | rounded_to_half(from[1]) << 16;
#else
  const __half2 pair = __floats2half2_rn(from[0], from[1]);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
#endif
}

template <typename T>
constexpr bool kHalfPrecision = std::is_same_v<T, BFloat> || std::is_same_v<T, Half>;

// What moves as one load or store of BYTES; addresses must be multiples of BYTES. The type decides: a structure of
// chars would be stored in up to 11 pieces.
template <int BYTES>
using Words = std::conditional_t<
    BYTES == 16, uint4,
    std::conditional_t<BYTES == 8, uint2, std::conditional_t<BYTES == 4, unsigned, unsigned short>>>;

template <int BYTES>
VG_DEVICE Words<BYTES> load_words(const void* from) {
#ifdef VG_EMULATE
  if (reinterpret_cast<uintptr_t>(from) % BYTES != 0) abort();  // a GPU would fault
  return *static_cast<const Words<BYTES>*>(from);
#else
  // Through the read-only cache, and free to move ahead of earlier additions to the gradients.
  return __ldg(static_cast<const Words<BYTES>*>(from));
#endif
}

template <int BYTES>
VG_DEVICE void store_words(const Words<BYTES>& words, void* to) {
#ifdef VG_EMULATE
  if (reinterpret_cast<uintptr_t>(to) % BYTES != 0) abort();
#endif
  *static_cast<Words<BYTES>*>(to) = words;
}

// Bytes per load or store of COUNT values.
template <int COUNT, typename T>
constexpr int kBytesAtOnce = COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16;

// Loads COUNT consecutive values, up to 16 bytes at once; the address must be aligned accordingly.
template <int COUNT, typename T, typename A>
VG_DEVICE void load(const T* from, A (&to)[COUNT]) {
  constexpr int bytes = kBytesAtOnce<COUNT, T>, each = bytes / sizeof(T);
  VG_UNROLL
  for (int first = 0; first < COUNT; first += each) {
    const Words<bytes> words = load_words<bytes>(from + first);
    if constexpr (kHalfPrecision<T> && each > 1) {
      uint32_t pairs[each / 2];
      memcpy(pairs, &words, bytes);
      VG_UNROLL
      for (int i = 0; i < each / 2; ++i) widen_pair(pairs[i], to + first + 2 * i, T());
    } else {
      T numbers[each];
      memcpy(numbers, &words, bytes);
      VG_UNROLL
      for (int i = 0; i < each; ++i) to[first + i] = widen(numbers[i]);
    }
  }
}

template <int COUNT, typename T, typename A>
VG_DEVICE void store(const A (&from)[COUNT], T* to) {
  constexpr int bytes = kBytesAtOnce<COUNT, T>, each = bytes / sizeof(T);
  VG_UNROLL
  for (int first = 0; first < COUNT; first += each) {
    Words<bytes> words;
    if constexpr (kHalfPrecision<T> && each > 1) {
      uint32_t pairs[each / 2];
      VG_UNROLL
      for (int i = 0; i < each / 2; ++i) pairs[i] = narrow_pair(from + first + 2 * i, T());
      memcpy(&words, pairs, bytes);
    } else {
      T numbers[each];
      VG_UNROLL
      for (int i = 0; i < each; ++i) narrow(from[first + i], &numbers[i]);
      memcpy(&words, numbers, bytes);
    }
    store_words<bytes>(words, to + first);
  }
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
