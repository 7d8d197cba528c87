// The backward kernels of the CPU; included once per instruction set. T, A and ranges as in cpu_forward.h.

namespace VG_ISA {

// ---- backward: tasks (b, head, level) ---------------------------------------------------------------------------
//
// Only one task adds to the gradients of a pixel, query after query: no atomics, and the sums are deterministic. A task
// sums in a buffer of its own, where pixels are D * sizeof(A) bytes apart. In grad_value they are H times as far apart:
// they would share a few sets of the L1 cache, and every fourth pixel would need another page table entry. The inputs
// have the same stride, which the hardware prefetcher does not detect: explicit prefetches halve the time.

constexpr int64_t kBlock = 64;  // queries; their points fit into the L1 cache

template <typename A>
struct Aligned {
  std::unique_ptr<A, void (*)(void*)> data;
  explicit Aligned(int64_t count) : data((A*)std::aligned_alloc(64, (count * sizeof(A) / 64 + 1) * 64), std::free) {
    if (!data) throw std::bad_alloc();
  }
};

// Prefetches C elements; the address may be past the end of its array.
template <int C, int kWrite = 0, typename T>
static inline void prefetch(const T* from) {
  for (int byte = 0; byte < C * int(sizeof(T)); byte += 64) __builtin_prefetch((const char*)from + byte, kWrite);
}

template <typename A, int C, typename T>
static inline void write_channels(const A* sums, int64_t stride, T* to, int64_t to_stride, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i) {
    prefetch<C, 1>(to + (i + 12) * to_stride);
    Channels<A, C>::load(sums + i * stride).store(to + i * to_stride);
  }
}

// Inputs and outputs of one task.
template <typename T, typename A>
struct Slice {
  const T* value;        // first pixel of the level
  int64_t value_stride;  // from pixel to pixel
  A* grad_value;         // [h * w, D], channels in the order of Channels::load; null if not needed
  const T* grad_output;  // of the block's first query
  int64_t grad_output_stride;
  A* dots;               // [points, 4] grad_output . pixel of each corner, null if not needed
  int64_t channels;
  int64_t points;        // per query
};

template <int C, typename T, typename A>
static inline void visit_corners(const Slice<T, A>& slice, const Points<A>& points, int64_t queries, int64_t c) {
  typedef Channels<A, C> Row;
  const T* value = slice.value + c;
  const int64_t stride = slice.value_stride;
  for (int64_t q = 0; q < queries; ++q) {
    const T* grad_output = slice.grad_output + q * slice.grad_output_stride + c;
    prefetch<C>(grad_output + 8 * slice.grad_output_stride);
    const Row grad = Row::load(grad_output);
    for (int64_t i = q * slice.points; i < (q + 1) * slice.points; ++i) {
      const int32_t inside = points.inside[i];
      if (!inside) continue;
      const int64_t cell = points.cell[i], row = points.row[i];
      const int64_t cells[4] = {cell, cell + 1, cell + row, cell + row + 1};
      const bool whole = __builtin_expect(inside == 15, 1);
      if (slice.dots) {
        typename Row::Vector sums[4] = {};
        if (whole) {
          for (int k = 0; k < 4; ++k) sums[k] = grad.products(Row::load(value + cells[k] * stride));
        } else {
          for (int k = 0; k < 4; ++k)
            if (inside >> k & 1) sums[k] = grad.products(Row::load(value + cells[k] * stride));
        }
        add_lane_sums<A, Row::kLanes>(sums, slice.dots + 4 * i);
      }
      if (slice.grad_value) {
        for (int k = 0; k < 4; ++k) {
          if (!whole && !(inside >> k & 1)) continue;
          A* to = slice.grad_value + cells[k] * slice.channels + c;
          Row sum = Row::load(to);
          sum.add_scaled(points.corner[k][i], grad);
          sum.store(to);
        }
      }
    }
  }
}

// Computes gradients of a block's locations and weights from the dot products, in place of the copied inputs.
template <typename A>
static void point_gradients(const Points<A>& points, const A* __restrict dots, A* __restrict locations,
                            A* __restrict weights, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const A m0 = dots[4 * i], m1 = dots[4 * i + 1], m2 = dots[4 * i + 2], m3 = dots[4 * i + 3];
    const A x = points.x[i], y = points.y[i], weight = points.inside[i] ? weights[i] : A(0);
    const A top = m0 + x * (m1 - m0), bottom = m2 + x * (m3 - m2);
    const A left = m0 + y * (m2 - m0), right = m1 + y * (m3 - m1);
    weights[i] = top + y * (bottom - top);
    locations[2 * i] = points.width[i] * weight * (right - left);
    locations[2 * i + 1] = points.height[i] * weight * (bottom - top);
  }
}

// A block of queries: only the points of the task's level, query after query.
template <typename A>
struct Block {
  std::vector<A> memory;
  A *locations, *weights, *dots;  // [points, 2], [points], [points, 4]; then gradients of the first two

  explicit Block(int64_t points) : memory(7 * points) {
    locations = memory.data(), weights = locations + 2 * points, dots = weights + points;
  }

  // `first` is the index of the first query's first point in weights, `step` the distance to the next query's.
  void read(const DeformAttnInputs& inputs, int64_t queries, int64_t points, int64_t first, int64_t step) {
    for (int64_t q = 0; q < queries; ++q) {
      const A* location = (const A*)inputs.locations + 2 * (first + q * step);
      const A* weight = (const A*)inputs.weights + first + q * step;
      std::copy_n(location, 2 * points, locations + 2 * q * points);
      std::copy_n(weight, points, weights + q * points);
    }
  }

  void write(const DeformAttnGradients& gradients, int64_t queries, int64_t points, int64_t first, int64_t step) {
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t to = first + q * step;
      if (gradients.locations)
        std::copy_n(locations + 2 * q * points, 2 * points, (A*)gradients.locations + 2 * to);
      if (gradients.weights) std::copy_n(weights + q * points, points, (A*)gradients.weights + to);
    }
  }
};

template <typename T, typename A>
static void backward_slice(const DeformAttnProblem& p, const DeformAttnInputs& inputs, Slice<T, A> slice,
                           const DeformAttnGradients& gradients, Points<A>& points, Block<A>& block, int64_t first) {
  const int64_t step = int64_t(p.heads) * p.levels * p.points;
  for (int64_t query = 0; query < p.queries; query += kBlock) {
    const int64_t queries = std::min(kBlock, p.queries - query), count = queries * p.points;
    block.read(inputs, queries, p.points, first, step);
    locate(points, block.locations, count);
    weigh_corners(points, block.weights, count);
    if (slice.dots) std::fill_n(block.dots, 4 * count, A(0));
    for (int64_t q = 0; q < queries; ++q) {  // prefetch the next block's inputs and this block's outputs
      const int64_t here = first + q * step, next = here + kBlock * step;
      __builtin_prefetch((const A*)inputs.locations + 2 * next);
      __builtin_prefetch((const A*)inputs.weights + next);
      if (gradients.locations) __builtin_prefetch((A*)gradients.locations + 2 * here, 1);
      if (gradients.weights) __builtin_prefetch((A*)gradients.weights + here, 1);
    }
    int32_t c = 0;
    for (; c + 32 <= p.channels; c += 32) visit_corners<32>(slice, points, queries, c);
    for (; c + 8 <= p.channels; c += 8) visit_corners<8>(slice, points, queries, c);
    for (; c < p.channels; ++c) visit_corners<1>(slice, points, queries, c);
    if (slice.dots) {
      point_gradients(points, block.dots, block.locations, block.weights, count);
      block.write(gradients, queries, p.points, first, step);
    }
    first += queries * step;
    slice.grad_output += queries * slice.grad_output_stride;
  }
}

template <typename T, typename A>
static void backward(const DeformAttnProblem& p, const DeformAttnInputs& inputs, const void* grad_output,
                     const DeformAttnGradients& gradients, int64_t begin, int64_t end) {
  int64_t largest = 0;
  for (int32_t l = 0; l < p.levels; ++l) largest = std::max(largest, int64_t(p.level[l].height) * p.level[l].width);
  const int64_t channels = p.channels, width = p.heads * channels;
  Aligned<A> sums(gradients.value ? largest * channels : 0);
  Points<A> points(kBlock * p.points);
  Block<A> block(points.count);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t level = task % p.levels, head = task / p.levels % p.heads, batch = task / p.levels / p.heads;
    const int64_t start = p.level[level].start, pixels = int64_t(p.level[level].height) * p.level[level].width;
    for (int64_t i = 0; i < points.count; ++i) points.set_level(i, p.level[level], 0);
    Slice<T, A> slice;
    slice.value = (const T*)inputs.value + batch * p.value_batch_stride + start * p.value_token_stride +
                  head * p.value_head_stride;
    slice.value_stride = p.value_token_stride;
    slice.grad_value = gradients.value ? sums.data.get() : nullptr;
    slice.grad_output = (const T*)grad_output + batch * p.queries * width + head * channels;
    slice.grad_output_stride = width;
    slice.dots = gradients.locations || gradients.weights ? block.dots : nullptr;
    slice.channels = channels, slice.points = p.points;
    if (slice.grad_value) std::fill_n(slice.grad_value, pixels * channels, A(0));
    const int64_t first = ((batch * p.queries * p.heads + head) * p.levels + level) * p.points;
    backward_slice(p, inputs, slice, gradients, points, block, first);
    if (!slice.grad_value) continue;
    T* to = (T*)gradients.value + (batch * p.tokens + start) * width + head * channels;
    int32_t c = 0;
    for (; c + 32 <= channels; c += 32) write_channels<A, 32>(slice.grad_value + c, channels, to + c, width, pixels);
    for (; c + 8 <= channels; c += 8) write_channels<A, 8>(slice.grad_value + c, channels, to + c, width, pixels);
    for (; c < channels; ++c) write_channels<A, 1>(slice.grad_value + c, channels, to + c, width, pixels);
  }
}

// ---- backward of the fused form: from gradients of locations and weights to those of its own inputs -------------

// Rows of [B * Q]. `weights` and the gradients of locations and weights are those of the plain form; gradients.offsets
// may alias grad_locations, and gradients.logits may alias grad_weights.
template <typename A>
static void finish(const DeformAttnProblem& p, const DeformAttnInputs& inputs, const void* weights,
                   const void* grad_locations, const void* grad_weights, const DeformAttnGradients& gradients,
                   int64_t begin, int64_t end) {
  QueryFrame<A> frame(p);
  const int64_t points = p.levels * p.points;
  for (int64_t row = begin; row < end; ++row) {
    frame.set(p, (const A*)inputs.reference, row);
    A* reference = (A*)gradients.reference + row * p.reference_levels * p.reference_size;
    if (gradients.reference) std::fill_n(reference, p.reference_levels * p.reference_size, A(0));
    for (int32_t head = 0; head < p.heads; ++head) {
      const int64_t first = (row * p.heads + head) * points;
      const A *given = (const A*)grad_locations + 2 * first, *offset = (const A*)inputs.offsets + 2 * first;
      if (gradients.reference) {
        for (int64_t i = 0; i < 2 * points; ++i) {
          A* to = reference + (p.reference_levels == 1 ? 0 : i / 2 / p.points) * p.reference_size + i % 2;
          to[0] += given[i];
          // A point that samples nothing may have an infinite offset, and 0 * infinity is NaN.
          if (p.reference_size == 4 && given[i] != 0) to[2] += given[i] * offset[i] * (A(0.5) / A(p.points));
        }
      }
      if (gradients.offsets) {
        A* to = (A*)gradients.offsets + 2 * first;
        for (int64_t i = 0; i < 2 * points; ++i) to[i] = given[i] != 0 ? given[i] * frame.scale[i] : A(0);
      }
      if (gradients.logits) {
        const A *weight = (const A*)weights + first, *grad = (const A*)grad_weights + first;
        A *to = (A*)gradients.logits + first, mean = 0;
        for (int64_t i = 0; i < points; ++i) mean += weight[i] * grad[i];
        for (int64_t i = 0; i < points; ++i) to[i] = weight[i] * (grad[i] - mean);
      }
    }
  }
}

}  // namespace VG_ISA
