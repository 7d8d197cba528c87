// The kernel of the forward pass.
#pragma once

#include "cuda_points.h"

namespace {

template <typename C>
VG_DEVICE void forward_row(
    const DeformAttnProblem& problem, const DeformAttnInputs& inputs, const Row& row, int lane,
    typename C::Value* output) {
  using A = typename C::Sum;
  using T = typename C::Value;
  const int channels = C::channels(problem), count = C::count(problem);
  const int token = static_cast<int>(problem.value_token_stride);
  Softmax<C> softmax{};
  if constexpr (C::FUSED) softmax = softmax_of_row<C>(problem, inputs, row, lane);

  for (int first = 0; first < channels; first += C::VECTOR * C::GROUP) {
    const int channel = first + lane * C::VECTOR;
    const bool real = row.real && channel < channels;
    const T* head = static_cast<const T*>(inputs.value) + row.batch * problem.value_batch_stride +
                    row.head * problem.value_head_stride + channel;
    A sums[C::VECTOR] = {};
    for (int batch = 0; batch < count; batch += C::BATCH) {
      Point<A> mine[C::SLOTS];
      prepare<C>(problem, inputs, row, softmax, batch + lane * C::SLOTS, mine);
      for (int owner = 0; owner < C::GROUP && (C::EXACT || batch + owner < count); ++owner) {
        const int line = problem.level[(batch + owner * C::SLOTS) / C::points(problem)].width * token;
        VG_UNROLL
        for (int slot = 0; slot < C::SLOTS; ++slot) {
          Point<A> point;
          const bool all_inside = hand_out<C>(mine[slot], lane, owner, &point);
          Shares<A> shares = shares_of(point, point.weight);
          const T* pixel = head + static_cast<int64_t>(point.corner()) * token;
          Packed<C::VECTOR, T> corners[4];
          const bool read = C::EXACT || real;  // in exact kernels, a row that is not real has no points
          if (all_inside && read) {
            VG_UNROLL
            for (int k = 0; k < 4; ++k) {
              corners[k] = load_packed<C::VECTOR>(pixel + (k & 1) * token + (k >> 1) * line);
            }
          } else {
            VG_UNROLL
            for (int k = 0; k < 4; ++k) {
              const bool inside = read && point.inside(k);
              corners[k] = load_packed<C::VECTOR>(pixel + (k & 1) * token + (k >> 1) * line, inside);
              shares.of[k] = inside ? shares.of[k] : 0;
            }
          }
          VG_UNROLL
          for (int k = 0; k < 4; ++k) {
            A values[C::VECTOR];
            unpack(corners[k], values);
            VG_UNROLL
            for (int c = 0; c < C::VECTOR; ++c) sums[c] += shares.of[k] * values[c];
          }
        }
      }
    }
    if (real) store(sums, output + row.index * channels + channel);
  }
}

template <typename C>
VG_KERNEL(4) void forward_kernel(
    const VG_PARAMETER DeformAttnProblem problem, const DeformAttnInputs inputs, typename C::Value* output) {
  const BlockPart part = block_part<C>(problem, static_cast<int>(problem.queries));
  const Row row = row_of(problem, part, part.position, part.position < problem.queries);
  if (all_of_warp(!row.real)) return;
  forward_row<C>(problem, inputs, row, thread_of_block() % C::GROUP, output);
}

}  // namespace
