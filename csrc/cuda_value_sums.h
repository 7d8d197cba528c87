// Sums of the gradient of value, to which lanes of many rows add: in floating point, or deterministically in fixed
// point.
#pragma once

#include "cuda_points.h"

namespace {

// Where the first four of 8 sums at `index` are; the last four are 16 further. Of every 32 sums, the first fours of all 8
// come before the last fours: lanes add four sums at a time, so neighboring lanes fill sectors of 32 bytes, where the
// order of the channels would make them add to twice as many halves.
VG_DEVICE int64_t first_four(int64_t index) { return index - (index & 31) / 2; }

template <typename C>
struct FloatingSums {
  using A = typename C::Sum;
  A* sums;  // [B, S, H, D]; if VECTOR is 8, in the order of first_four()

  // pixel: index of its first channel
  VG_DEVICE void add(int64_t pixel, int channel, const A (&x)[C::VECTOR]) const {
    if constexpr (C::VECTOR == 8) {
      // Both are the same if heads have 32 channels; the first costs no instruction per pixel.
      A* first = sums + (C::EXACT ? pixel + channel / 2 : first_four(pixel + channel));
      add_shared_four(first, x);
      add_shared_four(first + 16, x + 4);
    } else if constexpr (C::VECTOR == 4) {
      add_shared_four(sums + pixel + channel, x);
    } else {
      VG_UNROLL
      for (int c = 0; c < C::VECTOR; ++c) add_shared(sums + pixel + channel + c, x[c]);
    }
  }
};

// Integer sums do not depend on the order of additions, so they are deterministic.
struct FixedPointSums {
  unsigned long long* sums;  // [B, S, H, D] two's complement multiples of 1 / scale
  double scale;

  template <int VECTOR>
  VG_DEVICE void add(int64_t pixel, int channel, const float (&x)[VECTOR]) const {
    VG_UNROLL
    for (int c = 0; c < VECTOR; ++c) {
      add_shared(sums + pixel + channel + c, static_cast<unsigned long long>(llrint(x[c] * scale)));
    }
  }
};

// The largest magnitudes of the gradients of the output and of the weights, as bits of a float, which have the order of
// the magnitudes, with NaN last.
struct Limits {
  uint32_t grad_output, weight;
};

// The largest power of two for which no sum exceeds 62 bits; 0 if there is an infinity or NaN.
VG_DEVICE double fixed_point_scale(const DeformAttnProblem& problem, const Limits* limits) {
  const double weight = problem.reference_size ? 1.0 : bits_as_float(limits->weight);
  const double bound = weight * bits_as_float(limits->grad_output) * problem.queries * problem.points;
  if (!(bound < INFINITY)) return 0;
  return bound > 0 ? ldexp(1.0, 61 - ilogb(bound)) : 1;
}

// ---- before the first addition and after the last -----------------------------------------------------------------

template <typename T>
VG_DEVICE void largest_magnitude(const void* numbers, int64_t count, uint32_t* largest) {
  uint32_t mine = 0;
  for (int64_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    const float number = static_cast<float>(widen(static_cast<const T*>(numbers)[i]));
    const uint32_t magnitude = float_as_bits(number) & 0x7fffffffu;
    mine = mine < magnitude ? magnitude : mine;
  }
  mine = group_max<32>(mine);
  if (thread_of_block() % 32 == 0) max_shared(largest, mine);
}

template <typename T>
VG_KERNEL(4) void limits_kernel(
    const VG_PARAMETER DeformAttnProblem problem, const void* grad_output, const void* weights, Limits* limits) {
  const int64_t rows = problem.batch * problem.queries * problem.heads;
  largest_magnitude<T>(grad_output, rows * problem.channels, &limits->grad_output);
  if (!weights) return;
  const int64_t count = rows * problem.levels * problem.points;
  if (wide(problem)) {
    largest_magnitude<typename SumOf<T>::type>(weights, count, &limits->weight);
  } else {
    largest_magnitude<T>(weights, count, &limits->weight);
  }
}

// Rounds floating-point sums to half precision, VECTOR per thread, as lanes with VECTOR values have added them.
template <typename T, int VECTOR>
VG_KERNEL(4) void round_sums_kernel(const float* sums, int64_t count, T* grad_value) {
  for (int64_t i = VECTOR * thread_of_grid(); i < count; i += VECTOR * threads_of_grid()) {
    if constexpr (VECTOR == 8) {
      float fours[2][4], numbers[8];
      VG_UNROLL
      for (int k = 0; k < 2; ++k) load(sums + first_four(i) + 16 * k, fours[k]);
      memcpy(numbers, fours, sizeof numbers);
      store(numbers, grad_value + i);
    } else {
      narrow(sums[i], grad_value + i);
    }
  }
}

// Turns fixed-point sums into the gradient.
template <typename T>
VG_KERNEL(4) void finish_fixed_point_kernel(
    const VG_PARAMETER DeformAttnProblem problem, const long long* sums, const Limits* limits, int64_t count,
    T* grad_value) {
  using A = typename SumOf<T>::type;
  const double scale = fixed_point_scale(problem, limits);
  for (int64_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    // Fixed point cannot represent infinity and NaN: the whole gradient becomes NaN, which every check detects.
    narrow(scale > 0 ? static_cast<A>(sums[i] / scale) : A(NAN), grad_value + i);
  }
}

}  // namespace
