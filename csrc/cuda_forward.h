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
          const Shares<A> shares = shares_of(point, point.weight);
          const T* pixel = head + static_cast<int64_t>(point.corner) * token;
          A values[4][C::VECTOR];
          if (all_inside && (C::EXACT || real)) {
            VG_UNROLL
            for (int k = 0; k < 4; ++k) load(pixel + (k & 1) * token + (k >> 1) * line, values[k]);
            VG_UNROLL
            for (int k = 0; k < 4; ++k) {
              VG_UNROLL
              for (int c = 0; c < C::VECTOR; ++c) sums[c] += shares.of[k] * values[k][c];
            }
          } else if (real) {
            VG_UNROLL
            for (int k = 0; k < 4; ++k) {
              if (!(point.inside >> k & 1)) continue;
              load(pixel + (k & 1) * token + (k >> 1) * line, values[k]);
              VG_UNROLL
              for (int c = 0; c < C::VECTOR; ++c) sums[c] += shares.of[k] * values[k][c];
            }
          }
        }
      }
    }
    if (real) store(sums, output + row.head_row * channels + channel);
  }
}

template <typename C>
VG_KERNEL(4) void forward_kernel(
    const VG_PARAMETER DeformAttnProblem problem, const DeformAttnInputs inputs, typename C::Value* output) {
  const int lane = thread_of_block() % C::GROUP;
  const int row = block_x() * (kThreads / C::GROUP) + thread_of_block() / C::GROUP;
  for (int64_t batch = block_y(); batch < problem.batch; batch += blocks_y()) {
    forward_row<C>(
        problem, inputs, row_of(problem, batch, row, row < problem.queries * problem.heads), lane, output);
  }
}

}  // namespace
