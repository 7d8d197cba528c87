// Shared by the forward and backward kernels: the division of work, and the points of a row.
//
// A group of neighboring lanes computes one row: the D channels of one (batch, query, head). The lanes divide the work
// twice: each lane prepares a few of the row's L * P points (location, bounds, weight), which shuffles distribute, and
// each lane sums its own channels, 16 bytes at a time. csrc/README.md has a diagram and the reasons.
#pragma once

#include "cuda_words.h"
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

// ---- rows ---------------------------------------------------------------------------------------------------------

// The query that is processed at a position. Queries that are the pixels of the levels, as in an encoder, come in
// strips of 8 lines, column by column: 64 queries in a row are a tile of 8 x 8 pixels, which sample the same pixels.
// No position stays empty: at the end of a strip or level a tile continues in the next. Other queries keep their order.
VG_DEVICE int query_at(const DeformAttnProblem& problem, int position) {
  if (problem.queries != problem.tokens) return position;
  int index = problem.levels - 1;
  while (position < problem.level[index].start) --index;
  const DeformAttnLevel& level = problem.level[index];
  const int start = static_cast<int>(level.start), first_line = (position - start) / (8 * level.width) * 8;
  const int lines = level.height - first_line < 8 ? level.height - first_line : 8;
  const int position_in_strip = position - start - first_line * level.width, column = position_in_strip / lines;
  return start + (first_line + position_in_strip - column * lines) * level.width + column;
}

struct Row {
  bool real;  // lanes without a row work on row 0, because shuffles need whole warps
  int batch, query, head;
  int64_t index;  // in [B, Q, H]
};

// The rows of a block are of one head and of consecutive positions, to share pixels in L1. Blocks are ordered by batch,
// position, head.
struct BlockPart {
  int batch, head, position;  // position: of this lane
};

template <typename C>
VG_DEVICE BlockPart block_part(const DeformAttnProblem& problem, int positions) {
  const int rows = kThreads / C::GROUP, blocks = (positions + rows - 1) / rows, block = block_of_grid() / problem.heads;
  const int batch = block / blocks;
  return {batch, block_of_grid() % problem.heads, (block - batch * blocks) * rows + thread_of_block() / C::GROUP};
}

VG_DEVICE Row row_of(const DeformAttnProblem& problem, const BlockPart& part, int position, bool real) {
  const int query = query_at(problem, real ? position : 0);
  return {real, part.batch, query, part.head, (part.batch * problem.queries + query) * problem.heads + part.head};
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
  const int64_t start = row.index * count;
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
  int corner_and_inside;  // 16 * corner + inside: one register and one shuffle for two numbers
  A right, down;  // distance from that pixel, 0..1
  A weight;

  // Token above and left of the point; may be outside the level.
  VG_DEVICE int corner() const { return corner_and_inside >> 4; }
  // Whether corner k (0 that pixel, 1 right of it, 2 below it, 3 both) is inside the level.
  VG_DEVICE bool inside(int k) const { return corner_and_inside >> k & 1; }
  VG_DEVICE bool all_inside() const { return (corner_and_inside & 15) == 15; }
};

// A point that samples nothing.
template <typename A>
VG_DEVICE Point<A> no_point() {
  return {0, 0, 0, 0};
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
  const int corner = static_cast<int>(level.start) + line * width + column;
  const int inside = (in_left && in_top) | (in_right && in_top) << 1 | (in_left && in_bottom) << 2 |
                 (in_right && in_bottom) << 3;
  point.corner_and_inside = 16 * corner + inside;
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
    const DeformAttnProblem& problem, const DeformAttnInputs& inputs, const Row& row, int level) {
  const A* from = static_cast<const A*>(inputs.reference) + row.batch * problem.reference_batch_stride +
                  row.query * problem.reference_query_stride +
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
  const int64_t start = row.index * count + index;
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
    const Reference<A> reference = reference_of<A>(problem, inputs, row, level_index);
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
// several rows, are inside.
template <typename C>
VG_DEVICE bool hand_out(const Point<typename C::Sum>& mine, int lane, int owner, Point<typename C::Sum>* point) {
  point->corner_and_inside = from_lane<C::GROUP>(mine.corner_and_inside, owner);
  point->right = from_lane<C::GROUP>(mine.right, owner);
  point->down = from_lane<C::GROUP>(mine.down, owner);
  point->weight = from_lane<C::GROUP>(mine.weight, owner);
  return all_of_warp(point->all_inside());
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
