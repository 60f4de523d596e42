// One number, rounded to the dtype of the loss, for code that belongs to no instruction set.
#pragma once
#include "cross_entropy.h"

namespace fused_ce {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// Both round to nearest even.
inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = float_bits(value);
  return uint16_t(value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t float16_bits(float value) {
  const uint32_t bits = float_bits(value) & 0x7fffffff, sign = (float_bits(value) >> 16) & 0x8000;
  if (value != value) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
  // A subnormal is rounded at 2^-24 by the adder itself.
  if (bits < 0x38800000) return uint16_t(sign | (float_bits(__builtin_fabsf(value) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13));
}

inline void store_number(void* p, int64_t i, DType dtype, double value) {
  switch (dtype) {
    case DType::float64: static_cast<double*>(p)[i] = value; break;
    case DType::float32: static_cast<float*>(p)[i] = float(value); break;
    case DType::float16: static_cast<uint16_t*>(p)[i] = float16_bits(float(value)); break;
    default: static_cast<uint16_t*>(p)[i] = bfloat16_bits(float(value));
  }
}

template <class A> void store_numbers(void* p, DType dtype, const A* values, int64_t n) {
  const auto each = [&](auto* to, auto round) {
    for (int64_t i = 0; i < n; i++) to[i] = round(values[i]);
  };
  switch (dtype) {
    case DType::float64: return each(static_cast<double*>(p), [](A value) { return double(value); });
    case DType::float32: return each(static_cast<float*>(p), [](A value) { return float(value); });
    case DType::float16: return each(static_cast<uint16_t*>(p), [](A value) { return float16_bits(float(value)); });
    default: return each(static_cast<uint16_t*>(p), [](A value) { return bfloat16_bits(float(value)); });
  }
}

}  // namespace fused_ce
