// Channels of a pixel in vector registers, and sums over the lanes of a register; included once per instruction set.
//
// These are GCC vector types because automatic vectorization unrolls the channel loop completely and then finds only
// 16-byte vectors in it (2.3 times slower). VG_VECTOR_BYTES is the width of a register.

namespace VG_ISA {

// ---- C channels of one pixel in registers -----------------------------------------------------------------------

template <typename A, int C>
struct Channels {
  static constexpr int kNative = VG_VECTOR_BYTES / int(sizeof(A));
  // At least two vectors, because bfloat16 is unpacked into the even and the odd channels of a pair.
  static constexpr int kLanes = C == 1 ? 1 : (C / 2 < kNative ? C / 2 : kNative);
  static constexpr int kVectors = C / kLanes;
  typedef A Vector __attribute__((vector_size(kLanes * sizeof(A))));
  typedef A Unaligned __attribute__((vector_size(kLanes * sizeof(A)), aligned(sizeof(A)), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
  typedef uint32_t UnalignedBits __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

  Vector v[kVectors];

  static inline Channels zero() {
    Channels result;
    for (int i = 0; i < kVectors; ++i) result.v[i] = Vector{};
    return result;
  }

  static inline Channels load(const A* from) {
    Channels result;
    for (int i = 0; i < kVectors; ++i) result.v[i] = *(const Unaligned*)(from + i * kLanes);
    return result;
  }

  inline void store(A* to) const {
    for (int i = 0; i < kVectors; ++i) *(Unaligned*)(to + i * kLanes) = v[i];
  }

  // Two neighbors share a 32-bit word: a shift gives the first as float, a mask the second, so vectors 2i and 2i + 1
  // contain even and odd channels. store() restores the order; sums and products do not depend on it.
  static inline Channels load(const Bfloat16* from) {
    Channels result;
    if constexpr (C == 1) {
      result.v[0] = (Vector)(Bits{uint32_t(from->bits) << 16});
    } else {
      for (int i = 0; i < kVectors; i += 2) {
        const Bits pair = *(const UnalignedBits*)(from + i * kLanes);
        result.v[i] = (Vector)(pair << 16);
        result.v[i + 1] = (Vector)(pair & 0xffff0000u);
      }
    }
    return result;
  }

  inline void store(Bfloat16* to) const {
    if constexpr (C == 1) {
      to->bits = uint16_t(rounded(v[0])[0] >> 16);
    } else {
      for (int i = 0; i < kVectors; i += 2)
        *(UnalignedBits*)(to + i * kLanes) = (rounded(v[i]) >> 16) | (rounded(v[i + 1]) & 0xffff0000u);
    }
  }

  // Round to nearest even at bit 16; NaN stays NaN.
  static inline Bits rounded(Vector x) {
    const Bits bits = (Bits)x;
    return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : (bits | 0x00400000u);
  }

  inline void add_scaled(A scale, const Channels& other) {
    for (int i = 0; i < kVectors; ++i) v[i] += scale * other.v[i];
  }

  inline Vector products(const Channels& other) const {
    Vector sum = v[0] * other.v[0];
    for (int i = 1; i < kVectors; ++i) sum += v[i] * other.v[i];
    return sum;
  }
};

// ---- sums over the lanes of a vector ----------------------------------------------------------------------------

template <int N, typename Integer = int32_t>
struct Lanes {
  typedef Integer Mask __attribute__((vector_size(N * sizeof(Integer))));
  template <int By, int... I>
  static inline Mask rotation(std::integer_sequence<int, I...>) { return Mask{((I + By) % N)...}; }
  // Within each group of 4 lanes of a and b: (a[s], b[s], a[s + 1], b[s + 1]).
  template <int Start, int... I>
  static inline Mask interleave(std::integer_sequence<int, I...>) {
    return Mask{(I / 4 * 4 + Start + I % 4 / 2 + I % 2 * N)...};
  }
  // Within each group of 4 lanes of a and b: (a[s], a[s + 1], b[s], b[s + 1]).
  template <int Start, int... I>
  static inline Mask pairs(std::integer_sequence<int, I...>) {
    return Mask{(I / 4 * 4 + Start + I % 2 + I % 4 / 2 * N)...};
  }
};

template <int N, int By, typename V>
static inline V rotate(V v) {
  typedef std::conditional_t<sizeof(V) / N == 8, int64_t, int32_t> Integer;  // as wide as a lane
  return __builtin_shuffle(v, Lanes<N, Integer>::template rotation<By>(std::make_integer_sequence<int, N>()));
}

// A vector that fills a register.
template <typename A>
struct Native {
  static constexpr int kLanes = VG_VECTOR_BYTES / int(sizeof(A));
  typedef A Vector __attribute__((vector_size(VG_VECTOR_BYTES)));
  typedef A Unaligned __attribute__((vector_size(VG_VECTOR_BYTES), aligned(sizeof(A)), may_alias));

  static inline Vector load(const A* from) { return *(const Unaligned*)from; }

  template <int By = kLanes / 2>
  static inline A largest(Vector v) {
    if constexpr (By == 0) return v[0];
    else {
      const Vector other = rotate<kLanes, By>(v);
      return largest<By / 2>(v > other ? v : other);
    }
  }

  template <int By = kLanes / 2>
  static inline A sum(Vector v) {
    if constexpr (By == 0) return v[0];
    else return sum<By / 2>(v + rotate<kLanes, By>(v));
  }
};

// out[k] += sum of the lanes of sums[k], k = 0..3. One transpose for four sums costs a third of four separate ones.
template <typename A, int N, typename V>
static inline void add_lane_sums(const V (&sums)[4], A* out) {
  if constexpr (sizeof(A) == 4 && N >= 4) {
    const auto lanes = std::make_integer_sequence<int, N>();
    const auto low = Lanes<N>::template interleave<0>(lanes), high = Lanes<N>::template interleave<2>(lanes);
    const V first = __builtin_shuffle(sums[0], sums[1], low) + __builtin_shuffle(sums[0], sums[1], high);
    const V second = __builtin_shuffle(sums[2], sums[3], low) + __builtin_shuffle(sums[2], sums[3], high);
    V all = __builtin_shuffle(first, second, Lanes<N>::template pairs<0>(lanes)) +
            __builtin_shuffle(first, second, Lanes<N>::template pairs<2>(lanes));  // groups of (s0, s1, s2, s3)
    if constexpr (N >= 16) all += rotate<N, N / 2>(all);
    if constexpr (N >= 8) all += rotate<N, 4>(all);
    for (int k = 0; k < 4; ++k) out[k] += all[k];
  } else {
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < N; ++i) out[k] += sums[k][i];
  }
}

}  // namespace VG_ISA
