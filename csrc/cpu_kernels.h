// Forward and backward on the CPU; included once per instruction set.
//
// T is the type of values, A the accumulate type. Every function takes a range of rows (b, q) or of tasks and leaves
// threads to the caller; no number depends on how ranges are cut, so 1 thread and 64 give the same bits.

namespace VG_ISA {

// ---- forward: rows of [B * Q] -----------------------------------------------------------------------------------

template <typename T, typename A, int C>
static inline void sample(const T* value, int64_t stride, const Points<A>& points, int64_t first, int64_t count,
                          T* out) {
  typedef Channels<A, C> Row;
  Row top = Row::zero(), bottom = Row::zero();  // two chains of additions, since one would wait for itself
  for (int64_t i = first; i < first + count; ++i) {
    const T* upper = value + points.cell[i] * stride;
    const T* lower = upper + points.row[i] * stride;
    const int32_t inside = points.inside[i];
    if (__builtin_expect(inside == 15, 1)) {
      top.add_scaled(points.corner[0][i], Row::load(upper));
      bottom.add_scaled(points.corner[2][i], Row::load(lower));
      top.add_scaled(points.corner[1][i], Row::load(upper + stride));
      bottom.add_scaled(points.corner[3][i], Row::load(lower + stride));
    } else if (inside) {  // a corner outside must not be read: weight 0 times infinity is not 0
      if (inside & 1) top.add_scaled(points.corner[0][i], Row::load(upper));
      if (inside & 2) top.add_scaled(points.corner[1][i], Row::load(upper + stride));
      if (inside & 4) bottom.add_scaled(points.corner[2][i], Row::load(lower));
      if (inside & 8) bottom.add_scaled(points.corner[3][i], Row::load(lower + stride));
    }
  }
  top.add_scaled(A(1), bottom);
  top.store(out);
}

template <typename T, typename A>
static void forward(const DeformAttnProblem& p, const DeformAttnInputs& inputs, void* output, int64_t begin,
                    int64_t end) {
  const int64_t per_head = p.levels * p.points, per_query = p.heads * per_head;
  Points<A> points(per_query);
  for (int64_t i = 0; i < per_query; ++i) {
    const DeformAttnLevel& level = p.level[i % per_head / p.points];
    points.set_level(i, level, level.start);
  }
  QueryFrame<A> frame(p);
  std::vector<A> prepared(p.reference_size ? 3 * per_query : 0);
  for (int64_t row = begin; row < end; ++row) {
    const A* locations = (const A*)inputs.locations + 2 * per_query * row;
    const A* weights = (const A*)inputs.weights + per_query * row;
    if (p.reference_size) {
      locations = prepared.data(), weights = prepared.data() + 2 * per_query;
      prepare_query(p, inputs, frame, row, prepared.data(), prepared.data() + 2 * per_query);
    }
    place(points, locations, per_query);
    weigh_corners(points, weights, per_query);
    const T* value = (const T*)inputs.value + row / p.queries * p.value_batch_stride;
    T* out = (T*)output + row * p.heads * p.channels;
    const int64_t stride = p.value_token_stride;
    for (int32_t head = 0; head < p.heads; ++head, value += p.value_head_stride, out += p.channels) {
      const int64_t first = head * per_head;
      int32_t c = 0;
      for (; c + 32 <= p.channels; c += 32) sample<T, A, 32>(value + c, stride, points, first, per_head, out + c);
      for (; c + 8 <= p.channels; c += 8) sample<T, A, 8>(value + c, stride, points, first, per_head, out + c);
      for (; c < p.channels; ++c) sample<T, A, 1>(value + c, stride, points, first, per_head, out + c);
    }
  }
}

// ---- backward: tasks (b, head, level) ---------------------------------------------------------------------------
//
// A task alone adds to the gradients of its pixels, one query after the other: no atomics, and the same sums every
// time. It works on copies with D * sizeof(A) bytes from pixel to pixel: in value itself they are H times as far
// apart, and then a few sets of the L1 cache hold them all and every pixel or two needs a page table entry.

template <typename A>
struct Aligned {
  std::unique_ptr<A, void (*)(void*)> data;
  explicit Aligned(int64_t count) : data((A*)std::aligned_alloc(64, (count * sizeof(A) / 64 + 1) * 64), std::free) {
    if (!data) throw std::bad_alloc();
  }
};

template <typename A, int C, typename From, typename To>
static inline void copy_channels(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i) Channels<A, C>::load(from + i * from_stride).store(to + i * to_stride);
}

// Converts as it copies. The order of channels within a pixel of A is that of Channels::load.
template <typename A, typename From, typename To>
static void copy_pixels(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t pixels,
                        int32_t channels) {
  int32_t c = 0;
  for (; c + 32 <= channels; c += 32) copy_channels<A, 32>(from + c, from_stride, to + c, to_stride, pixels);
  for (; c + 8 <= channels; c += 8) copy_channels<A, 8>(from + c, from_stride, to + c, to_stride, pixels);
  for (; c < channels; ++c) copy_channels<A, 1>(from + c, from_stride, to + c, to_stride, pixels);
}

// What one task reads and adds to.
template <typename T, typename A, typename Pixel>
struct Slice {
  const Pixel* value;    // first pixel of the level
  int64_t value_stride;  // from pixel to pixel
  A* grad_value;         // [h * w, D], or null where no gradient is wanted
  const T* grad_output;  // of the block's first query
  int64_t grad_output_stride;
  A* matches;            // [points, 4] grad_output . pixel of each corner, or null where not wanted
  int64_t channels;
  int64_t points;        // per query
};

template <typename A, int C, typename T, typename Pixel>
static inline void visit_corners(const Slice<T, A, Pixel>& slice, const Points<A>& points, int64_t queries, int64_t c) {
  typedef Channels<A, C> Row;
  const Pixel* value = slice.value + c;
  const int64_t stride = slice.value_stride;
  for (int64_t q = 0; q < queries; ++q) {
    const Row grad = Row::load(slice.grad_output + q * slice.grad_output_stride + c);
    for (int64_t i = q * slice.points; i < (q + 1) * slice.points; ++i) {
      const int32_t inside = points.inside[i];
      if (!inside) continue;
      const int64_t cells[4] = {points.cell[i], points.cell[i] + 1, points.cell[i] + points.row[i],
                                points.cell[i] + points.row[i] + 1};
      const bool whole = __builtin_expect(inside == 15, 1);
      if (slice.matches) {
        typename Row::Vector sums[4] = {};
        if (whole) {
          for (int k = 0; k < 4; ++k) sums[k] = grad.products(Row::load(value + cells[k] * stride));
        } else {
          for (int k = 0; k < 4; ++k)
            if (inside >> k & 1) sums[k] = grad.products(Row::load(value + cells[k] * stride));
        }
        add_lane_sums<A, Row::kLanes>(sums, slice.matches + 4 * i);
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

// Gradients of a block's locations and weights from the matches; both in place of their inputs' copies.
template <typename A>
static void point_gradients(const Points<A>& points, const A* __restrict matches, A* __restrict locations,
                            A* __restrict weights, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const A m0 = matches[4 * i], m1 = matches[4 * i + 1], m2 = matches[4 * i + 2], m3 = matches[4 * i + 3];
    const A x = points.x[i], y = points.y[i], weight = points.inside[i] ? weights[i] : A(0);
    const A top = m0 + x * (m1 - m0), bottom = m2 + x * (m3 - m2);
    const A left = m0 + y * (m2 - m0), right = m1 + y * (m3 - m1);
    weights[i] = top + y * (bottom - top);
    locations[2 * i] = points.width[i] * weight * (right - left);
    locations[2 * i + 1] = points.height[i] * weight * (bottom - top);
  }
}

template <typename T, typename A, typename Pixel>
static void backward_slice(const DeformAttnProblem& p, const DeformAttnInputs& inputs, Slice<T, A, Pixel> slice,
                           const DeformAttnGradients& gradients, Points<A>& points, A* scratch, int64_t batch,
                           int32_t head, int32_t level) {
  const int64_t block = points.count / p.points, per_head = p.levels * p.points;
  A *locations = scratch, *weights = scratch + 2 * points.count, *matches = scratch + 3 * points.count;
  const T* grad_output = slice.grad_output;
  for (int64_t i = 0; i < points.count; ++i) points.set_level(i, p.level[level], 0);
  slice.matches = gradients.locations || gradients.weights ? matches : nullptr;
  for (int64_t query = 0; query < p.queries; query += block) {
    const int64_t queries = std::min(block, p.queries - query), count = queries * p.points;
    const int64_t first = ((batch * p.queries + query) * p.heads + head) * per_head + level * p.points;
    const int64_t step = p.heads * per_head;
    for (int64_t q = 0; q < queries; ++q) {
      std::copy_n((const A*)inputs.locations + 2 * (first + q * step), 2 * p.points, locations + 2 * q * p.points);
      std::copy_n((const A*)inputs.weights + first + q * step, p.points, weights + q * p.points);
    }
    place(points, locations, count);
    weigh_corners(points, weights, count);
    if (slice.matches) std::fill_n(matches, 4 * count, A(0));
    slice.grad_output = grad_output + query * slice.grad_output_stride;
    int32_t c = 0;
    for (; c + 32 <= p.channels; c += 32) visit_corners<A, 32>(slice, points, queries, c);
    for (; c + 8 <= p.channels; c += 8) visit_corners<A, 8>(slice, points, queries, c);
    for (; c < p.channels; ++c) visit_corners<A, 1>(slice, points, queries, c);
    if (!slice.matches) continue;
    point_gradients(points, matches, locations, weights, count);
    for (int64_t q = 0; q < queries; ++q) {
      if (gradients.locations)
        std::copy_n(locations + 2 * q * p.points, 2 * p.points, (A*)gradients.locations + 2 * (first + q * step));
      if (gradients.weights)
        std::copy_n(weights + q * p.points, p.points, (A*)gradients.weights + first + q * step);
    }
  }
}

template <typename T, typename A>
static void backward(const DeformAttnProblem& p, const DeformAttnInputs& inputs, const void* grad_output,
                     const DeformAttnGradients& gradients, int64_t begin, int64_t end) {
  int64_t largest = 0;
  for (int32_t l = 0; l < p.levels; ++l)
    largest = std::max(largest, int64_t(p.level[l].height) * p.level[l].width);
  const int64_t channels = p.channels, width = p.heads * channels;
  const int64_t block = 64;  // queries at once: their points stay in the L1 cache
  Aligned<A> value_copy(largest * channels), grad_copy(gradients.value ? largest * channels : 0);
  Points<A> points(block * p.points);
  std::vector<A> scratch(7 * points.count);
  for (int64_t task = begin; task < end; ++task) {
    const int32_t level = task % p.levels, head = task / p.levels % p.heads;
    const int64_t batch = task / p.levels / p.heads, start = p.level[level].start;
    const int64_t pixels = int64_t(p.level[level].height) * p.level[level].width;
    const T* value = (const T*)inputs.value + batch * p.value_batch_stride + start * p.value_token_stride +
                     head * p.value_head_stride;
    const T* grad = (const T*)grad_output + batch * p.queries * width + head * channels;
    A* grad_value = gradients.value ? grad_copy.data.get() : nullptr;
    if (grad_value) std::fill_n(grad_value, pixels * channels, A(0));
    copy_pixels<A>(value, p.value_token_stride, value_copy.data.get(), channels, pixels, p.channels);
    const Slice<T, A, A> slice{value_copy.data.get(), channels, grad_value, grad, width, nullptr, channels, p.points};
    backward_slice(p, inputs, slice, gradients, points, scratch.data(), batch, head, level);
    if (grad_value)
      copy_pixels<A>(grad_value, channels, (T*)gradients.value + (batch * p.tokens + start) * width + head * channels,
                     width, pixels, p.channels);
  }
}

// ---- backward of the fused form: from gradients of locations and weights to those of its own inputs -------------

// Rows of [B * Q]. `weights` and the gradients of locations and weights are those of the plain form; gradients.offsets
// may be the memory of grad_locations, and gradients.logits that of grad_weights.
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
          // A point that samples nothing may have an infinite offset, and 0 times infinity is not 0.
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

template <typename T, typename A>
static CpuKernels kernels() {
  return {forward<T, A>, prepare<A>, backward<T, A>, finish<A>};
}

static inline CpuKernels kernels(int32_t dtype) {
  if (dtype == kFloat64) return kernels<double, double>();
  return dtype == kFloat32 ? kernels<float, float>() : kernels<Bfloat16, float>();
}

}  // namespace VG_ISA
