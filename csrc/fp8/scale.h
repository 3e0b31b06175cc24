// Scales, and what they leave of a value: to the bit what the torch backend makes of them.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "../machine.h"

namespace r1::fp8 {

constexpr float LARGEST = 448.0f;  // of e4m3

R1_BOTH float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

R1_BOTH uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// amax / 448, or the next power of two; 1 for a block of zeros; never 0, a denormal or infinite.
R1_BOTH float scale_of(float amax, bool power_of_two) {
  if (amax == 0.0f) return 1.0f;
  float scale = fminf(fmaxf(amax / LARGEST, FLT_MIN), FLT_MAX);
  if (power_of_two) {
    const uint32_t bits = to_bits(scale), exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0);
    scale = from_bits((exponent < 254 ? exponent : 254) << 23);  // at most 2 ** 127
  }
  return scale;
}

// x / scale, correctly rounded, for many x: one reciprocal, then a product and two fused corrections each, which give
// the rounded quotient where nothing on the way is denormal or overflows (Markstein, IBM J. R&D 34 (1990) 111). A power
// of two brings both operands there; a quotient too small for float32 is 0 in e4m3 anyhow.
struct Divisor {
  float factor, scale, reciprocal;

  R1_BOTH explicit Divisor(float whole)
      : factor(whole < 0x1p-60f  ? 0x1p64f
               : whole > 0x1p60f ? 0x1p-64f
                                 : 1.0f),
        scale(whole * factor),
        reciprocal(1.0f / scale) {}

  R1_BOTH float quotient(float x) const {
    const float y = x * factor, near = y * reciprocal;
    const float exact = fmaf(fmaf(-near, scale, y), reciprocal, near);
    // An infinite x would leave NaN: it is 448 like all that is too large. The sign is of a zero.
    return fabsf(x) <= FLT_MAX ? copysignf(exact, x) : x;
  }
};

}  // namespace r1::fp8
