// The forward kernel of the CPU; included once per instruction set.
//
// T is the type of values, A the accumulate type. Every function takes a range of rows (b, q) or of tasks; the caller
// starts the threads. Results do not depend on the ranges, so 1 thread and 64 give the same bits.

namespace VG_ISA {

// ---- forward: rows of [B * Q] -----------------------------------------------------------------------------------

template <typename T, typename A, int C>
static inline void sample(const T* value, int64_t stride, const Points<A>& points, int64_t first, int64_t count,
                          T* out) {
  typedef Channels<A, C> Row;
  Row top = Row::zero(), bottom = Row::zero();  // two chains of additions hide their latency
  for (int64_t i = first; i < first + count; ++i) {
    const T* upper = value + points.cell[i] * stride;
    const T* lower = upper + points.row[i] * stride;
    const int32_t inside = points.inside[i];
    if (__builtin_expect(inside == 15, 1)) {
      top.add_scaled(points.corner[0][i], Row::load(upper));
      bottom.add_scaled(points.corner[2][i], Row::load(lower));
      top.add_scaled(points.corner[1][i], Row::load(upper + stride));
      bottom.add_scaled(points.corner[3][i], Row::load(lower + stride));
    } else if (inside) {  // corners outside must not be read: weight 0 * infinity is NaN
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
    locate(points, locations, per_query);
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

}  // namespace VG_ISA
