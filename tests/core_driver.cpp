// forward() and backward() without Python, in every instruction set of this build, against the definition of the loss
// in long double: what a cross-compiled core can show under an emulator (tests/aarch64.sh). Prints the largest errors
// of loss and gradient in ULP of the dtype, and fails where they are above what `python -m fused_ce` allows.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"

using namespace fused_ce;
using Real = long double;
using Reals = std::vector<Real>;

namespace {

struct Format {
  DType dtype;
  const char* name;
  int width, digits, least;  // bytes, bits of the significand, exponent of the smallest normal number
  double allowed;
};
constexpr Format FORMATS[] = {{DType::float32, "float32", 4, 24, -126, 16},
                              {DType::float64, "float64", 8, 53, -1022, 32},
                              {DType::bfloat16, "bfloat16", 2, 8, -126, 0.51},
                              {DType::float16, "float16", 2, 11, -14, 0.51}};

float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  return bits >> 15 ? -size : size;
}

Real read(const char* from, const Format& format) {
  double wide;
  float narrow;
  uint16_t half;
  switch (format.dtype) {
    case DType::float64: return std::memcpy(&wide, from, 8), wide;
    case DType::float32: return std::memcpy(&narrow, from, 4), narrow;
    case DType::float16: return std::memcpy(&half, from, 2), from_half(half);
    default: {
      std::memcpy(&half, from, 2);
      const uint32_t bits = uint32_t(half) << 16;
      return std::memcpy(&narrow, &bits, 4), narrow;
    }
  }
}

Real in_ulp(Real found, Real exact, const Format& format) {
  int exponent;
  std::frexp(exact, &exponent);
  const int last = (exponent - 1 > format.least ? exponent - 1 : format.least) - (format.digits - 1);
  return std::fabs(found - exact) / std::ldexp(Real(1), last);
}

struct Case {
  int64_t rows, C;
  bool class_last;
  double smoothing, k, softcap, L;
};

// Rows in the lanes and classes in the lanes, whole vectors and their rests, blocks and their rests, each option.
constexpr Case CASES[] = {
    {1, 1, true, 0, 1, 0, 0},      {9, 10, true, 0, 1, 0, 0},          {37, 19, false, 0.1, 1, 0, 0},
    {5, 384, true, 0, 1, 0, 1e-3}, {3, 1000, true, 0, 1, 0, 0},        {3, 1001, false, 0.1, 0.7, 0, 1e-4},
    {2, 32000, true, 0, 1, 0, 0},  {2, 50257, true, 0.1, 1, 30, 1e-4}, {4, 4099, true, 0, 1 / 0.7, 0, 0}};

struct Errors { Real loss = 0, grad = 0; };

Errors errors(const Case& its, const Format& format, bool fused, int threads) {
  std::mt19937_64 engine(its.rows * 1000003 + its.C);
  const int64_t n = its.rows * its.C;
  std::vector<char> input(n * format.width), grad(n * format.width), loss(its.rows * 8);
  std::vector<int64_t> target(its.rows);
  std::vector<double> saved(its.rows * 5);
  for (int64_t i = 0; i < n; i++) {
    const float narrow = float(int64_t(engine() % 20001) - 10000) / 1024;
    const double wide = narrow;
    char* const to = &input[i * format.width];
    if (format.width == 8) std::memcpy(to, &wide, 8);
    else if (format.width == 4) std::memcpy(to, &narrow, 4);
    else if (format.dtype == DType::bfloat16) std::memcpy(to, reinterpret_cast<const char*>(&narrow) + 2, 2);
    else {
      const uint16_t half = uint16_t(engine() & 0x8000) | uint16_t(engine() % (19 << 10));  // up to 15.99
      std::memcpy(to, &half, 2);
    }
  }
  for (int64_t& y : target) y = int64_t(engine() % its.C);

  Call call{};
  call.C = call.total = its.C, call.rows = its.rows, call.dims.rank = 1, call.dims.sizes[0] = its.rows, call.scale = 1;
  call.options = {-100, its.smoothing, its.k, its.softcap, its.L};
  const int64_t class_stride = its.class_last ? 1 : its.rows, row_stride = its.class_last ? its.C : 1;
  call.input.data = input.data(), call.input.dtype = format.dtype;
  call.input.class_stride = class_stride, call.input.strides[0] = row_stride;
  call.target.data = target.data(), call.target.dtype = DType::int64, call.target.strides[0] = 1;
  View dx = call.input;
  dx.data = grad.data();
  call.across = lanes_across_rows(call);
  call.saved = saved.data();
  if (fused) call.grad = dx;
  const bool wide = format.dtype == DType::float64;
  forward(call, Reduction::none, NAN, loss.data(), wide ? DType::float64 : DType::float32, threads);
  if (!fused) call.grad = dx, backward(call, Reduction::none, NAN, threads);

  // Sums of the 16-bit loss come in float32.
  const Format& of_loss = FORMATS[wide];
  Errors worst;
  for (int64_t r = 0; r < its.rows; r++) {
    Reals z(its.C), slope(its.C, its.k);
    Real m = -INFINITY, sum = 0, mean_z = 0;
    for (int64_t c = 0; c < its.C; c++) {
      const Real x = read(&input[(r * row_stride + c * class_stride) * format.width], format);
      z[c] = its.k * x;
      if (its.softcap > 0) {
        const Real t = std::tanh(Real(its.k) / its.softcap * x);
        z[c] = its.softcap * t, slope[c] = its.k * (1 - t * t);
      }
      m = std::fmax(m, z[c]), mean_z += z[c] / its.C;
    }
    for (int64_t c = 0; c < its.C; c++) sum += std::exp(z[c] - m);
    const Real lse = m + std::log(sum), e = its.smoothing, L = its.L;
    const Real exact = lse - (1 - e) * z[target[r]] - e * mean_z + L * lse * lse;
    worst.loss = std::fmax(worst.loss, in_ulp(read(&loss[r * of_loss.width], of_loss), exact, of_loss));
    for (int64_t c = 0; c < its.C; c++) {
      const Real p = std::exp(z[c] - lse), q = e / its.C + (c == target[r] ? 1 - e : Real(0));
      const Real dz = p * (1 + 2 * L * lse) - q,
                 found = read(&grad[(r * row_stride + c * class_stride) * format.width], format);
      // Where p and q cancel, the last digit is that of the larger one.
      const Real size =
          std::fmax(std::fabs(dz), its.smoothing > 0 ? std::fmax(p, q) : std::fabs(dz)) * std::fabs(slope[c]);
      worst.grad = std::fmax(worst.grad, in_ulp(size + (found - dz * slope[c]), size, format));
    }
  }
  return worst;
}

}  // namespace

int main() {
  bool failed = false;
  int count;
  const Isa* all = isas(&count);
  for (int i = 0; i < count; i++) {
    if (!all[i].runs_here()) continue;
    set_isa(all[i].name);
    for (const Format& format : FORMATS) {
      Errors worst;
      for (const Case& its : CASES)
        for (const bool fused : {true, false})
          for (const int threads : {1, 2}) {
            const Errors found = errors(its, format, fused, threads);
            worst = {std::fmax(worst.loss, found.loss), std::fmax(worst.grad, found.grad)};
          }
      const double of_loss = format.width == 8 ? FORMATS[1].allowed : FORMATS[0].allowed;
      const bool wrong = !(worst.loss <= of_loss && worst.grad <= format.allowed);
      std::printf("%-8s %-9s loss %6.2Lf  gradient %6.2Lf ULP%s\n", all[i].name, format.name, worst.loss, worst.grad,
                  wrong ? "  WRONG" : "");
      failed |= wrong;
    }
  }
  return failed;
}
