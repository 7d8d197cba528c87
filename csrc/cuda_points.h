// Shared by the forward and backward kernels: the division of work, and the points of a row.
//
// A group of neighboring lanes computes one row: the D channels of one (batch, query, head). The lanes divide the work
// twice: each lane prepares a few of the row's L * P points (location, bounds, weight), which shuffles distribute, and
// each lane sums its own channels, 16 bytes at a time. csrc/README.md has a diagram and the reasons.
#pragma once

#include "cuda_lanes.h"
#include "deform_attn.h"

namespace {

template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

// The division of work of a kernel. LEVELS = POINTS = 0: levels, points and channels are known only at run time.
template <typename T, int VECTOR_, int GROUP_, int LEVELS, int POINTS, bool FUSED_>
struct Cut {
  using Value = T;
  using Sum = typename SumOf<T>::type;
  static constexpr int VECTOR = VECTOR_;  // channels per load of a lane
  static constexpr int GROUP = GROUP_;    // lanes per row
  static constexpr bool FUSED = FUSED_;
  static constexpr bool EXACT = LEVELS > 0;  // sizes known at compile time: D = VECTOR * GROUP, one batch of points
  static constexpr int SLOTS = EXACT ? LEVELS * POINTS / GROUP : 1;  // points per lane and batch, all of one level
  static constexpr int BATCH = SLOTS * GROUP;                        // points per batch
  static_assert(!EXACT || POINTS % SLOTS == 0);

  VG_DEVICE static int points(const DeformAttnProblem& problem) { return EXACT ? POINTS : problem.points; }
  VG_DEVICE static int count(const DeformAttnProblem& problem) {
    return EXACT ? LEVELS * POINTS : problem.levels * problem.points;
  }
  VG_DEVICE static int channels(const DeformAttnProblem& problem) {
    return EXACT ? VECTOR * GROUP : problem.channels;
  }
};

// The row of a lane. Lanes beyond the last row work on row 0, because shuffles need whole warps.
struct Row {
  bool real;
  int64_t batch, query;  // query: index over all batches, like head_row
  int head;
  int64_t head_row;
};

VG_DEVICE Row row_of(const DeformAttnProblem& problem, int64_t batch, int row, bool real) {
  row = real ? row : 0;
  const int query = row / problem.heads, head = row - query * problem.heads;
  const int64_t queries = batch * problem.queries;
  return {real, batch, queries + query, head, queries * problem.heads + row};
}

// ---- parameters: locations or offsets, weights or logits ----------------------------------------------------------

// Reads COUNT values in the dtype of value (narrow) or of sums; all lanes take the same branch.
template <typename T, int COUNT, typename A>
VG_DEVICE void load_parameters(const void* from, bool wide, int64_t index, A (&to)[COUNT]) {
  if (wide) {
    load(static_cast<const A*>(from) + index, to);
  } else {
    load(static_cast<const T*>(from) + index, to);
  }
}

template <typename T, int COUNT, typename A>
VG_DEVICE void store_parameters(const A (&from)[COUNT], bool wide, int64_t index, void* to) {
  if (wide) {
    store(from, static_cast<A*>(to) + index);
  } else {
    store(from, static_cast<T*>(to) + index);
  }
}

VG_DEVICE bool wide(const DeformAttnProblem& problem) { return problem.query_dtype != problem.value_dtype; }

// The softmax of a row, and with EXACT the results of this lane's slots.
template <typename C>
struct Softmax {
  using A = typename C::Sum;
  A largest, scale;  // 1 / sum of exp(logit - largest)
  A results[C::SLOTS];

  VG_DEVICE A of(A logit) const { return exp(logit - largest) * scale; }
};

template <typename C>
VG_DEVICE Softmax<C> softmax_of_row(
    const DeformAttnProblem& problem, const DeformAttnInputs& inputs, const Row& row, int lane) {
  using A = typename C::Sum;
  const int count = C::count(problem);
  const int64_t start = row.head_row * count;
  Softmax<C> softmax{-INFINITY, 0};
  A logits[C::SLOTS];
  for (int index = lane * C::SLOTS; index < count; index += C::BATCH) {
    load_parameters<typename C::Value>(inputs.logits, wide(problem), start + index, logits);
    VG_UNROLL
    for (int i = 0; i < C::SLOTS; ++i) softmax.largest = softmax.largest < logits[i] ? logits[i] : softmax.largest;
  }
  softmax.largest = group_max<C::GROUP>(softmax.largest);
  A total = 0;
  for (int index = lane * C::SLOTS; index < count; index += C::BATCH) {
    if (!C::EXACT) load_parameters<typename C::Value>(inputs.logits, wide(problem), start + index, logits);
    VG_UNROLL
    for (int i = 0; i < C::SLOTS; ++i) total += softmax.results[i] = exp(logits[i] - softmax.largest);
  }
  softmax.scale = 1 / group_sum<C::GROUP>(total);
  VG_UNROLL
  for (int i = 0; i < C::SLOTS; ++i) softmax.results[i] *= softmax.scale;
  return softmax;
}

// ---- points -------------------------------------------------------------------------------------------------------

template <typename A>
struct Point {
  int corner;  // token above and left of the point; may be outside the level
  int inside;  // bit k: corner k (0 that pixel, 1 right of it, 2 below it, 3 both) is inside the level
  A right, down;  // distance from that pixel, 0..1
  A weight;
};

constexpr int kAllInside = 15;

// A point that samples nothing.
template <typename A>
VG_DEVICE Point<A> no_point() {
  return {0, 0, 0, 0, 0};
}

template <typename A>
VG_DEVICE Point<A> point_at(A x, A y, A weight, const DeformAttnLevel& level) {
  const int height = level.height, width = level.width;
  Point<A> point = no_point<A>();
  point.weight = weight;
  // Comparisons with NaN are false; coordinates that pass fit into an int.
  if (!(x > -1 && y > -1 && x < width && y < height)) return point;
  const A left = floor(x), top = floor(y);
  const int column = static_cast<int>(left), line = static_cast<int>(top);
  const bool in_left = column >= 0, in_right = column + 1 < width, in_top = line >= 0, in_bottom = line + 1 < height;
  point.corner = static_cast<int>(level.start) + line * width + column;
  point.inside = (in_left && in_top) | (in_right && in_top) << 1 | (in_left && in_bottom) << 2 |
                 (in_right && in_bottom) << 3;
  point.right = x - left;
  point.down = y - top;
  return point;
}

// The reference of a row and level: a point or a box.
template <typename A>
struct Reference {
  A x, y, width, height;
};

template <typename A>
VG_DEVICE Reference<A> reference_of(
    const DeformAttnProblem& problem, const DeformAttnInputs& inputs, int64_t batch, int64_t query, int level) {
  const A* from = static_cast<const A*>(inputs.reference) + batch * problem.reference_batch_stride +
                  (query - batch * problem.queries) * problem.reference_query_stride +
                  (problem.reference_levels == 1 ? 0 : level) * problem.reference_level_stride;
  const bool box = problem.reference_size == 4;
  return {from[0], from[1], box ? from[2] : 0, box ? from[3] : 0};
}

// Fills this lane's slots with the points `index`, `index` + 1, ... of the row.
template <typename C>
VG_DEVICE void prepare(
    const DeformAttnProblem& problem, const DeformAttnInputs& inputs, const Row& row, const Softmax<C>& softmax,
    int index, Point<typename C::Sum> (&points)[C::SLOTS]) {
  using A = typename C::Sum;
  const int count = C::count(problem);
  VG_UNROLL
  for (int i = 0; i < C::SLOTS; ++i) points[i] = no_point<A>();
  if (!row.real || (!C::EXACT && index >= count)) return;

  A positions[2 * C::SLOTS], weights[C::SLOTS];
  const int64_t start = row.head_row * count + index;
  load_parameters<typename C::Value>(
      C::FUSED ? inputs.offsets : inputs.locations, !C::FUSED || wide(problem), 2 * start, positions);
  if constexpr (!C::FUSED || !C::EXACT) {
    load_parameters<typename C::Value>(C::FUSED ? inputs.logits : inputs.weights, wide(problem), start, weights);
  }
  const int level_index = index / C::points(problem);
  const DeformAttnLevel& level = problem.level[level_index];
  const A width = level.width, height = level.height;
  // location = origin + position * step, in pixels
  A origin_x = 0, origin_y = 0, step_x = width, step_y = height;
  if constexpr (C::FUSED) {
    const Reference<A> reference = reference_of<A>(problem, inputs, row.batch, row.query, level_index);
    const bool box = problem.reference_size == 4;  // else offsets are pixels
    const A part = A(0.5) / C::points(problem);
    origin_x = reference.x * width, origin_y = reference.y * height;
    step_x = box ? reference.width * part * width : 1;
    step_y = box ? reference.height * part * height : 1;
  }
  VG_UNROLL
  for (int i = 0; i < C::SLOTS; ++i) {
    const A x = origin_x + positions[2 * i] * step_x, y = origin_y + positions[2 * i + 1] * step_y;
    const A weight = !C::FUSED ? weights[i] : C::EXACT ? softmax.results[i] : softmax.of(weights[i]);
    points[i] = point_at<A>(x - A(0.5), y - A(0.5), weight, level);
  }
}

// Distributes the point of lane `owner` to its group. Returns whether all corners of the points of the warp, which has
// several rows, are inside; only if not, `inside` is exchanged.
template <typename C>
VG_DEVICE bool hand_out(const Point<typename C::Sum>& mine, int lane, int owner, Point<typename C::Sum>* point) {
  point->corner = from_lane<C::GROUP>(mine.corner, owner);
  point->right = from_lane<C::GROUP>(mine.right, owner);
  point->down = from_lane<C::GROUP>(mine.down, owner);
  point->weight = from_lane<C::GROUP>(mine.weight, owner);
  point->inside = kAllInside;
  const bool all_inside = all_of_warp(lane != owner || mine.inside == kAllInside);
  if (!all_inside) point->inside = from_lane<C::GROUP>(mine.inside, owner);
  return all_inside;
}

// Bilinear weights of the four corners.
template <typename A>
struct Shares {
  A of[4];
};

template <typename A>
VG_DEVICE Shares<A> shares_of(const Point<A>& point, A weight) {
  const A below = weight * point.down, above = weight - below;
  const A below_right = below * point.right, above_right = above * point.right;
  return {{above - above_right, above_right, below - below_right, below_right}};
}

}  // namespace
