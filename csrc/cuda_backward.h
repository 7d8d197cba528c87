// The kernels of the backward pass.
#pragma once

#include "cuda_points.h"
#include "cuda_value_sums.h"

namespace {

// ---- one row ------------------------------------------------------------------------------------------------------

// Intermediate results for later kernels and later steps of the backward kernel; null if not needed.
template <typename A>
struct Scratch {
  void* value_sums;
  const Limits* limits;
  A* locations;  // [B, Q, H, L, P, 2] fused form: gradients of locations, summed for the reference
  A* weights;    // [B, Q, H, L * P] fused form, sizes unknown at compile time: gradients of the softmax's results
};

template <typename A>
struct PointGradient {
  A weight, x, y;  // x, y: per pixel, before the point's weight
};

// Adds to the gradient of value around the point and returns this lane's share of the point's own gradients.
template <typename C, typename Sums>
VG_DEVICE PointGradient<typename C::Sum> point_backward(
    const DeformAttnProblem& problem, const Point<typename C::Sum>& point, int width, bool all_inside, const Row& row,
    int lane, const typename C::Value* value, const typename C::Value* grad_output,
    const typename C::Sum (&grad_at_once)[C::VECTOR], bool needs_value, const Sums& sums) {
  using A = typename C::Sum;
  const int channels = C::channels(problem);
  const int token = static_cast<int>(problem.value_token_stride), sums_token = problem.heads * channels;
  const Shares<A> shares = shares_of(point, A(1)), weighted = shares_of(point, point.weight);
  const typename C::Value* pixel = value + static_cast<int64_t>(point.corner()) * token;
  const int64_t sums_pixel = (row.batch * problem.tokens + point.corner()) * sums_token + row.head * channels;

  A dots[4] = {};  // dot product of each corner's pixel and the gradient of the output
  const auto visit_corners = [&](auto inside) {
    for (int first = 0; first < channels; first += C::VECTOR * C::GROUP) {
      const int channel = first + lane * C::VECTOR;
      if (!C::EXACT && channel >= channels) break;
      A grad[C::VECTOR];
      if constexpr (C::EXACT) {
        VG_UNROLL
        for (int c = 0; c < C::VECTOR; ++c) grad[c] = grad_at_once[c];
      } else {
        load(grad_output + row.index * channels + channel, grad);
      }
      Packed<C::VECTOR, typename C::Value> corners[4];
      VG_UNROLL
      for (int k = 0; k < 4; ++k) {
        corners[k] = load_packed<C::VECTOR>(pixel + channel + (k & 1) * token + (k >> 1) * (width * token), inside(k));
      }
      VG_UNROLL
      for (int k = 0; k < 4; ++k) {
        A values[C::VECTOR];
        unpack(corners[k], values);
        VG_UNROLL
        for (int c = 0; c < C::VECTOR; ++c) dots[k] += grad[c] * values[c];
      }
      if (!needs_value) continue;
      VG_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (!inside(k)) continue;
        A parts[C::VECTOR];
        VG_UNROLL
        for (int c = 0; c < C::VECTOR; ++c) parts[c] = weighted.of[k] * grad[c];
        sums.add(sums_pixel + (k & 1) * sums_token + (k >> 1) * (width * sums_token), channel, parts);
      }
    }
  };
  // In both cases the four loads start together.
  if (all_inside) {
    visit_corners([](int) { return true; });
  } else {
    visit_corners([&](int k) { return point.inside(k); });
    VG_UNROLL
    for (int k = 0; k < 4; ++k) dots[k] = point.inside(k) ? dots[k] : 0;  // NaN if the gradient is infinite
  }
  return {
      shares.of[0] * dots[0] + shares.of[1] * dots[1] + shares.of[2] * dots[2] + shares.of[3] * dots[3],
      (1 - point.down) * (dots[1] - dots[0]) + point.down * (dots[3] - dots[2]),
      (1 - point.right) * (dots[2] - dots[0]) + point.right * (dots[3] - dots[1])};
}

// Writes the gradients of this lane's locations, or of its offsets and the terms of the reference's gradient.
template <typename C>
VG_DEVICE void store_position_gradients(
    const DeformAttnProblem& problem, const DeformAttnInputs& inputs, const DeformAttnGradients& gradients,
    const Scratch<typename C::Sum>& scratch, const Row& row, int index,
    const Point<typename C::Sum> (&points)[C::SLOTS], const PointGradient<typename C::Sum> (&found)[C::SLOTS]) {
  using A = typename C::Sum;
  using T = typename C::Value;
  const int64_t start = 2 * (row.index * C::count(problem) + index);
  const int level = index / C::points(problem);
  const A width = problem.level[level].width, height = problem.level[level].height;
  const bool box = C::FUSED && problem.reference_size == 4;
  Reference<A> reference{};
  if (box) reference = reference_of<A>(problem, inputs, row, level);
  const A part = A(0.5) / C::points(problem);
  A of_locations[2 * C::SLOTS], of_offsets[2 * C::SLOTS];
  VG_UNROLL
  for (int i = 0; i < C::SLOTS; ++i) {
    const A x = found[i].x * points[i].weight, y = found[i].y * points[i].weight;
    of_locations[2 * i] = x * width;
    of_locations[2 * i + 1] = y * height;
    // A gradient of 0 stays 0 even if the size of the box is not finite.
    of_offsets[2 * i] = !box || x == 0 ? x : of_locations[2 * i] * reference.width * part;
    of_offsets[2 * i + 1] = !box || y == 0 ? y : of_locations[2 * i + 1] * reference.height * part;
  }
  if constexpr (C::FUSED) {
    if (gradients.offsets) store_parameters<T>(of_offsets, wide(problem), start, gradients.offsets);
    if (scratch.locations) store(of_locations, scratch.locations + start);
  } else {
    if (gradients.locations) store(of_locations, static_cast<A*>(gradients.locations) + start);
  }
}

// Sizes unknown at compile time: gradients of the softmax's results stay in scratch until their mean is known.
template <typename C>
VG_DEVICE void softmax_backward(
    const DeformAttnProblem& problem, const DeformAttnInputs& inputs, const DeformAttnGradients& gradients,
    const Scratch<typename C::Sum>& scratch, const Row& row, int lane, const Softmax<C>& softmax,
    typename C::Sum mean) {
  using A = typename C::Sum;
  const int count = C::count(problem);
  for (int index = lane; index < count; index += C::GROUP) {
    const int64_t element = row.index * count + index;
    A numbers[1];
    load_parameters<typename C::Value>(inputs.logits, wide(problem), element, numbers);
    numbers[0] = softmax.of(numbers[0]) * (scratch.weights[element] - mean);
    store_parameters<typename C::Value>(numbers, wide(problem), element, gradients.logits);
  }
}

template <typename C, typename Sums>
VG_DEVICE void backward_row(
    const DeformAttnProblem& problem, const DeformAttnInputs& inputs, const typename C::Value* grad_output,
    const DeformAttnGradients& gradients, const Scratch<typename C::Sum>& scratch, const Row& row, int lane,
    const Sums& sums) {
  using A = typename C::Sum;
  using T = typename C::Value;
  const int channels = C::channels(problem), count = C::count(problem);
  const T* head = static_cast<const T*>(inputs.value) + row.batch * problem.value_batch_stride +
                  row.head * problem.value_head_stride;
  const bool needs_weights = C::FUSED ? gradients.logits : gradients.weights;
  Softmax<C> softmax{};
  if constexpr (C::FUSED) softmax = softmax_of_row<C>(problem, inputs, row, lane);
  A grad[C::VECTOR] = {};
  if constexpr (C::EXACT) load(grad_output + row.index * channels + lane * C::VECTOR, grad);

  A mean = 0;  // of the gradients of the softmax's results, weighted by the results
  for (int batch = 0; batch < count; batch += C::BATCH) {
    const int index = batch + lane * C::SLOTS;
    Point<A> mine[C::SLOTS];
    prepare<C>(problem, inputs, row, softmax, index, mine);
    PointGradient<A> found[C::SLOTS] = {};
    for (int owner = 0; owner < C::GROUP && (C::EXACT || batch + owner < count); ++owner) {
      const int width = problem.level[(batch + owner * C::SLOTS) / C::points(problem)].width;
      VG_UNROLL
      for (int slot = 0; slot < C::SLOTS; ++slot) {
        Point<A> point;
        const bool all_inside = hand_out<C>(mine[slot], lane, owner, &point);
        PointGradient<A> part = point_backward<C>(
            problem, point, width, all_inside, row, lane, head, grad_output, grad, gradients.value, sums);
        part.weight = group_sum<C::GROUP>(part.weight);
        part.x = group_sum<C::GROUP>(part.x);
        part.y = group_sum<C::GROUP>(part.y);
        if (lane == owner) found[slot] = part;
      }
    }

    A of_weights[C::SLOTS];
    VG_UNROLL
    for (int i = 0; i < C::SLOTS; ++i) {
      of_weights[i] = found[i].weight;
      mean += mine[i].weight * found[i].weight;
    }
    if constexpr (C::FUSED && C::EXACT) {
      mean = group_sum<C::GROUP>(mean);
      VG_UNROLL
      for (int i = 0; i < C::SLOTS; ++i) of_weights[i] = mine[i].weight * (of_weights[i] - mean);
    }
    if (!row.real || (!C::EXACT && index >= count)) continue;
    store_position_gradients<C>(problem, inputs, gradients, scratch, row, index, mine, found);
    if (!needs_weights) continue;
    const int64_t element = row.index * count + index;
    if constexpr (C::FUSED && !C::EXACT) {
      store(of_weights, scratch.weights + element);
    } else {
      store_parameters<T>(of_weights, wide(problem), element, C::FUSED ? gradients.logits : gradients.weights);
    }
  }
  if constexpr (C::FUSED && !C::EXACT) {
    mean = group_sum<C::GROUP>(mean);
    if (row.real && needs_weights) {
      softmax_backward<C>(problem, inputs, gradients, scratch, row, lane, softmax, mean);
    }
  }
}

// queries_at_once: queries that are processed in parallel. One, instead of all, puts the additions to each sum into a
// fixed order.
template <typename C, bool FIXED_POINT>
VG_KERNEL(2) void backward_kernel(
    const VG_PARAMETER DeformAttnProblem problem, const DeformAttnInputs inputs, const typename C::Value* grad_output,
    const DeformAttnGradients gradients, const Scratch<typename C::Sum> scratch, int queries_at_once) {
  using A = typename C::Sum;
  const int lane = thread_of_block() % C::GROUP, queries = static_cast<int>(problem.queries);
  const BlockPart part = block_part<C>(problem, queries_at_once);
  for (int first = 0; first < queries; first += queries_at_once) {
    const int position = first + part.position;
    const Row row = row_of(problem, part, position, part.position < queries_at_once && position < queries);
    if (all_of_warp(!row.real)) continue;
    if constexpr (FIXED_POINT) {
      const FixedPointSums sums{
          static_cast<unsigned long long*>(scratch.value_sums), fixed_point_scale(problem, scratch.limits)};
      backward_row<C>(problem, inputs, grad_output, gradients, scratch, row, lane, sums);
    } else {
      const FloatingSums<C> sums{static_cast<A*>(scratch.value_sums)};
      backward_row<C>(problem, inputs, grad_output, gradients, scratch, row, lane, sums);
    }
  }
}

// ---- after all rows -----------------------------------------------------------------------------------------------

// One thread per reference sums the gradients of all its locations, always in the same order.
template <typename A, typename T>
VG_KERNEL(4) void reference_kernel(
    const VG_PARAMETER DeformAttnProblem problem, const DeformAttnInputs inputs, const A* of_locations,
    A* of_reference) {
  const int levels = problem.reference_levels == 1 ? problem.levels : 1, row = problem.levels * problem.points;
  const int64_t count = problem.batch * problem.queries * problem.reference_levels;
  for (int64_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    const int64_t query = i / problem.reference_levels;
    const int level = static_cast<int>(i - query * problem.reference_levels);
    A sums[4] = {};
    for (int head = 0; head < problem.heads; ++head) {
      for (int p = level * problem.points; p < (level + levels) * problem.points; ++p) {
        const int64_t element = 2 * ((query * problem.heads + head) * row + p);
        const A found[2] = {of_locations[element], of_locations[element + 1]};
        A offset[2] = {};
        if (problem.reference_size == 4) {
          A one[1];
          VG_UNROLL
          for (int axis = 0; axis < 2; ++axis) {
            load_parameters<T>(inputs.offsets, wide(problem), element + axis, one);
            offset[axis] = one[0];
          }
        }
        VG_UNROLL
        for (int axis = 0; axis < 2; ++axis) {
          sums[axis] += found[axis];
          // A gradient of 0 stays 0 even if the offset is not finite.
          if (found[axis] != 0) sums[2 + axis] += found[axis] * offset[axis] * (A(0.5) / problem.points);
        }
      }
    }
    VG_UNROLL
    for (int axis = 0; axis < 4; ++axis) {
      if (axis < problem.reference_size) of_reference[i * problem.reference_size + axis] = sums[axis];
    }
  }
}

}  // namespace
