// Positions and weights of the sampled points of a query; included once per instruction set.
//
// A is the accumulate type (float, or double for double values), also of offsets, logits, weights and references.

namespace VG_ISA {

// ---- positions and corner weights -------------------------------------------------------------------------------

// A structure of arrays, so the compiler vectorizes the loops below.
template <typename A>
struct Points {
  int64_t count;
  std::vector<A> reals;
  std::vector<int32_t> integers;
  A *width, *height;    // of the point's level, in pixels
  int32_t *row, *start; // the same width as integer; first token of the level
  A *x, *y;             // position within the cell, 0..1
  A* corner[4];         // weight of each corner: (y0,x0), (y0,x1), (y1,x0), (y1,x1)
  int32_t* cell;        // token of corner (y0,x0); undefined if that corner is outside
  int32_t* inside;      // bit k: corner k is inside the level; 0: the point contributes nothing

  explicit Points(int64_t count) : count(count), reals(8 * count), integers(4 * count) {
    A* real = reals.data();
    width = real, height = real + count, x = real + 2 * count, y = real + 3 * count;
    for (int k = 0; k < 4; ++k) corner[k] = real + (4 + k) * count;
    int32_t* integer = integers.data();
    row = integer, start = integer + count, cell = integer + 2 * count, inside = integer + 3 * count;
  }

  void set_level(int64_t point, const DeformAttnLevel& level, int64_t first_token) {
    width[point] = A(level.width), height[point] = A(level.height);
    row[point] = level.width, start[point] = int32_t(first_token);
  }
};

// Fills x, y, cell, inside from (x, y) pairs in 0..1. align_corners=False: pixel = location * size - 0.5.
template <typename A>
static void locate(Points<A>& points, const A* __restrict location, int64_t count) {
  const A *__restrict width = points.width, *__restrict height = points.height;
  const int32_t *__restrict row = points.row, *__restrict start = points.start;
  A *__restrict fraction_x = points.x, *__restrict fraction_y = points.y;
  int32_t *__restrict cell = points.cell, *__restrict inside = points.inside;
#pragma GCC ivdep  // no two of these arrays overlap; GCC takes __restrict from parameters only
  for (int64_t i = 0; i < count; ++i) {
    A x = location[2 * i] * width[i] - A(0.5), y = location[2 * i + 1] * height[i] - A(0.5);
    // False for NaN. Points outside get position 0, because converting them to an integer could overflow.
    const bool near = (x > A(-1)) & (x < width[i]) & (y > A(-1)) & (y < height[i]);
    x = near ? x : A(0), y = near ? y : A(0);
    int32_t x0 = int32_t(x), y0 = int32_t(y);
    x0 -= x < A(x0), y0 -= y < A(y0);  // truncated to floor
    fraction_x[i] = x - A(x0), fraction_y[i] = y - A(y0);
    const int32_t left = x0 >= 0, right = x0 + 1 < row[i], top = y0 >= 0, bottom = A(y0 + 1) < height[i];
    const int32_t corners = (top & left) | (top & right) << 1 | (bottom & left) << 2 | (bottom & right) << 3;
    inside[i] = near ? corners : 0;
    cell[i] = start[i] + y0 * row[i] + x0;
  }
}

template <typename A>
static void weigh_corners(Points<A>& points, const A* __restrict weight, int64_t count) {
  const A *__restrict x = points.x, *__restrict y = points.y;
  A *__restrict w0 = points.corner[0], *__restrict w1 = points.corner[1];
  A *__restrict w2 = points.corner[2], *__restrict w3 = points.corner[3];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const A bottom = weight[i] * y[i], top = weight[i] - bottom;
    w1[i] = top * x[i], w0[i] = top - w1[i];
    w3[i] = bottom * x[i], w2[i] = bottom - w3[i];
  }
}

// ---- the fused form: softmax and sampling locations -------------------------------------------------------------

static inline double exponential(double x) { return std::exp(x); }

// e^x for x <= 0, within 2 units in the last place; NaN stays NaN. Branch-free, so it is vectorized.
static inline float exponential(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = x * 1.44269504f + magic;
  const float whole = shifted - magic;
  const float r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;  // |r| <= ln(2) / 2
  float e = 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + (127u << 23);
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : e * power;
}

template <typename A>
static inline void softmax(const A* __restrict logits, A* __restrict weights, int64_t count) {
  typedef Native<A> Vector;
  // The remainder that does not fill a vector is scalar; 16 points fill one or two vectors.
  const int64_t filled = count / Vector::kLanes * Vector::kLanes;
  A largest = -std::numeric_limits<A>::infinity(), sum = 0;
  if (filled) {
    auto all = Vector::load(logits);
    for (int64_t i = Vector::kLanes; i < filled; i += Vector::kLanes) {
      const auto more = Vector::load(logits + i);
      all = all > more ? all : more;
    }
    largest = Vector::largest(all);
  }
  for (int64_t i = filled; i < count; ++i) largest = largest > logits[i] ? largest : logits[i];
  for (int64_t i = 0; i < count; ++i) weights[i] = exponential(logits[i] - largest);
  if (filled) {
    auto all = Vector::load(weights);
    for (int64_t i = Vector::kLanes; i < filled; i += Vector::kLanes) all += Vector::load(weights + i);
    sum = Vector::sum(all);
  }
  for (int64_t i = filled; i < count; ++i) sum += weights[i];
  const A scale = A(1) / sum;
  for (int64_t i = 0; i < count; ++i) weights[i] *= scale;
}

// The locations of a query are base + offset * scale; base and scale are [L * P, 2] and equal for all heads.
template <typename A>
struct QueryFrame {
  std::vector<A> base, scale;
  explicit QueryFrame(const DeformAttnProblem& p) : base(2 * p.levels * p.points), scale(2 * p.levels * p.points) {}

  void set(const DeformAttnProblem& p, const A* reference, int64_t row) {
    const A* query = reference + row / p.queries * p.reference_batch_stride +
                     row % p.queries * p.reference_query_stride;
    for (int32_t l = 0; l < p.levels; ++l) {
      const A* point = query + (p.reference_levels == 1 ? 0 : l) * p.reference_level_stride;
      const A size[2] = {A(p.level[l].width), A(p.level[l].height)};
      for (int axis = 0; axis < 2; ++axis) {
        // Nothing is sampled from an empty level, so any finite size works.
        A step = A(1) / (size[axis] > 1 ? size[axis] : A(1));
        if (p.reference_size == 4) step = point[2 + axis] * A(0.5) / A(p.points);
        for (int32_t i = l * p.points; i < (l + 1) * p.points; ++i)
          base[2 * i + axis] = point[axis], scale[2 * i + axis] = step;
      }
    }
  }
};

// Locations [H, L, P, 2] and weights [H, L, P] of one query from its reference point, offsets and logits.
template <typename A>
static void prepare_query(const DeformAttnProblem& p, const DeformAttnInputs& inputs, QueryFrame<A>& frame, int64_t row,
                          A* locations, A* weights) {
  const int64_t points = p.levels * p.points;
  frame.set(p, (const A*)inputs.reference, row);
  for (int32_t head = 0; head < p.heads; ++head) {
    const int64_t first = (row * p.heads + head) * points;
    const A* __restrict offsets = (const A*)inputs.offsets + 2 * first;
    const A *__restrict base = frame.base.data(), *__restrict scale = frame.scale.data();
    A* __restrict location = locations + 2 * head * points;
#pragma GCC ivdep
    for (int64_t i = 0; i < 2 * points; ++i) location[i] = base[i] + offsets[i] * scale[i];
    softmax((const A*)inputs.logits + first, weights + head * points, points);
  }
}

template <typename A>
static void prepare(const DeformAttnProblem& p, const DeformAttnInputs& inputs, void* locations, void* weights,
                    int64_t begin, int64_t end) {
  QueryFrame<A> frame(p);
  const int64_t points = int64_t(p.heads) * p.levels * p.points;
  for (int64_t row = begin; row < end; ++row)
    prepare_query(p, inputs, frame, row, (A*)locations + 2 * points * row, (A*)weights + points * row);
}

}  // namespace VG_ISA
