// Loads and stores of one lane, 16 bytes at once, and conversions between float32 and half precision.
#pragma once

#include "cuda_lanes.h"

namespace {

// Storage of half-precision values; all arithmetic is float32.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// NaN is a special case because rounding up would carry into the exponent.
inline uint16_t rounded_to_bfloat(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float widened_from_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  float x;
  if (exponent == 31) {
    x = fraction ? NAN : INFINITY;
  } else {  // subnormal: exponent 0 means 1, without the leading bit
    x = ldexpf(exponent ? fraction + 1024 : fraction, (exponent ? exponent : 1) - 25);
  }
  return bits & 0x8000 ? -x : x;
}

inline uint16_t rounded_to_half(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  if (x != x) return static_cast<uint16_t>(sign | 0x7e00);
  x = fabsf(x);
  if (x >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent = -14;
  if (x >= ldexpf(1, -14)) exponent = ilogbf(x);
  // Fractions are multiples of 2^(exponent - 10); rounding up to 2048 carries into the exponent, which is correct.
  const int fraction = static_cast<int>(rintf(ldexpf(x, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + fraction));
}

VG_DEVICE float bits_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

VG_DEVICE uint32_t float_as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

VG_DEVICE double widen(double x) { return x; }
VG_DEVICE float widen(float x) { return x; }
VG_DEVICE float widen(BFloat x) { return bits_as_float(static_cast<uint32_t>(x.bits) << 16); }
VG_DEVICE float widen(Half x) {
#ifdef VG_EMULATE
  return widened_from_half(x.bits);
#else
  return __half2float(__ushort_as_half(x.bits));
#endif
}

VG_DEVICE void narrow(double x, double* to) { *to = x; }
VG_DEVICE void narrow(float x, float* to) { *to = x; }
VG_DEVICE void narrow(float x, BFloat* to) {
#ifdef VG_EMULATE
  to->bits = rounded_to_bfloat(float_as_bits(x));
#else
  to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#endif
}
VG_DEVICE void narrow(float x, Half* to) {
#ifdef VG_EMULATE
  to->bits = rounded_to_half(x);
#else
  to->bits = __half_as_ushort(__float2half_rn(x));
#endif
}

// Two half-precision numbers of a 32-bit word. The compiler does not find the single instruction that each takes.
VG_DEVICE void widen_pair(uint32_t word, float* to, BFloat) {
  to[0] = bits_as_float(word << 16);
  to[1] = bits_as_float(word & 0xffff0000u);
}
VG_DEVICE void widen_pair(uint32_t word, float* to, Half) {
#ifdef VG_EMULATE
  to[0] = widened_from_half(static_cast<uint16_t>(word));
  to[1] = widened_from_half(static_cast<uint16_t>(word >> 16));
#else
  __half2 pair;
  memcpy(&pair, &word, sizeof pair);
  to[0] = __low2float(pair);
  to[1] = __high2float(pair);
#endif
}

VG_DEVICE uint32_t narrow_pair(const float* from, BFloat) {
#ifdef VG_EMULATE
  return rounded_to_bfloat(float_as_bits(from[0])) | rounded_to_bfloat(float_as_bits(from[1])) << 16;
#else
  const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
#endif
}
VG_DEVICE uint32_t narrow_pair(const float* from, Half) {
#ifdef VG_EMULATE
  return rounded_to_half(from[0]) | rounded_to_half(from[1]) << 16;
#else
  const __half2 pair = __floats2half2_rn(from[0], from[1]);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
#endif
}

template <typename T>
constexpr bool kHalfPrecision = std::is_same_v<T, BFloat> || std::is_same_v<T, Half>;

// What moves as one load or store of BYTES; addresses must be multiples of BYTES. The type decides: a structure of
// chars would be stored in up to 11 pieces.
template <int BYTES>
using Words = std::conditional_t<
    BYTES == 16, uint4,
    std::conditional_t<BYTES == 8, uint2, std::conditional_t<BYTES == 4, unsigned, unsigned short>>>;

template <int BYTES>
VG_DEVICE Words<BYTES> load_words(const void* from) {
#ifdef VG_EMULATE
  if (reinterpret_cast<uintptr_t>(from) % BYTES != 0) abort();  // a GPU would fault
  return *static_cast<const Words<BYTES>*>(from);
#else
  // Through the read-only cache, and free to move ahead of earlier additions to the gradients.
  return __ldg(static_cast<const Words<BYTES>*>(from));
#endif
}

template <int BYTES>
VG_DEVICE void store_words(const Words<BYTES>& words, void* to) {
#ifdef VG_EMULATE
  if (reinterpret_cast<uintptr_t>(to) % BYTES != 0) abort();
#endif
  *static_cast<Words<BYTES>*>(to) = words;
}

// Bytes per load or store of COUNT values.
template <int COUNT, typename T>
constexpr int kBytesAtOnce = COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16;

// COUNT values as they are in memory: half of the registers of widened half-precision values.
template <int COUNT, typename T>
struct Packed {
  static constexpr int BYTES = kBytesAtOnce<COUNT, T>, EACH = BYTES / sizeof(T);
  Words<BYTES> words[COUNT / EACH];
};

// Loads COUNT consecutive values, up to 16 bytes at once; the address must be aligned accordingly. If they are not
// wanted, they are 0 and nothing is read; this takes no branch, so several loads start together.
template <int COUNT, typename T>
VG_DEVICE Packed<COUNT, T> load_packed(const T* from, bool wanted = true) {
  using P = Packed<COUNT, T>;
  P packed{};
  VG_UNROLL
  for (int i = 0; i < COUNT / P::EACH; ++i) {
    if (wanted) packed.words[i] = load_words<P::BYTES>(from + i * P::EACH);
  }
  return packed;
}

template <int COUNT, typename T, typename A>
VG_DEVICE void unpack(const Packed<COUNT, T>& packed, A (&to)[COUNT]) {
  if constexpr (kHalfPrecision<T> && COUNT > 1) {
    uint32_t pairs[COUNT / 2];
    memcpy(pairs, &packed, sizeof packed);
    VG_UNROLL
    for (int i = 0; i < COUNT / 2; ++i) widen_pair(pairs[i], to + 2 * i, T());
  } else {
    T numbers[COUNT];
    memcpy(numbers, &packed, sizeof packed);
    VG_UNROLL
    for (int i = 0; i < COUNT; ++i) to[i] = widen(numbers[i]);
  }
}

template <int COUNT, typename T, typename A>
VG_DEVICE void load(const T* from, A (&to)[COUNT]) {
  unpack(load_packed<COUNT>(from), to);
}

template <int COUNT, typename T, typename A>
VG_DEVICE void store(const A (&from)[COUNT], T* to) {
  constexpr int bytes = kBytesAtOnce<COUNT, T>, each = bytes / sizeof(T);
  VG_UNROLL
  for (int first = 0; first < COUNT; first += each) {
    Words<bytes> words;
    if constexpr (kHalfPrecision<T> && each > 1) {
      uint32_t pairs[each / 2];
      VG_UNROLL
      for (int i = 0; i < each / 2; ++i) pairs[i] = narrow_pair(from + first + 2 * i, T());
      memcpy(&words, pairs, bytes);
    } else {
      T numbers[each];
      VG_UNROLL
      for (int i = 0; i < each; ++i) narrow(from[first + i], &numbers[i]);
      memcpy(&words, numbers, bytes);
    }
    store_words<bytes>(words, to + first);
  }
}

}  // namespace
