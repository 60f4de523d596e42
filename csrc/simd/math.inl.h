// exp, tanh and log1p of vectors, and sums that keep what is rounded off.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

// 2^n (1 + reduced), for t that holds n and t_0 that holds 0 in its low bits. Multiplied by processors that can;
// elsewhere n goes where the exponent stands.
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
INLINE Vec::f32 multiply_power(Vec::f32 reduced, Vec::f32 t, Vec::f32 t_0) {
  return (Vec::f32)_mm512_scalef_ps((__m512)(1 + reduced), (__m512)(t - t_0));
}
INLINE Vec::f64 multiply_power(Vec::f64 reduced, Vec::f64 t, Vec::f64 t_0) {
  return (Vec::f64)_mm512_scalef_pd((__m512d)(1 + reduced), (__m512d)(t - t_0));
}
#else
template <class V> INLINE V multiply_power(V reduced, V t, V t_0) {
  typedef typename Integers<V>::bits U;  // a NaN's bits may overflow
  typedef Constants<decltype(V{}[0] + 0)> K;
  const V power = (V)(((U)t - (U)t_0 + K::bias) << K::mantissa);
  return power + power * reduced;
}
#endif

// A number as the sum of two: `low` is what rounding cut off. z of float32 logits needs it where a scale or a softcap
// made z: near 30 it is rounded by 1e-6, and a loss is a difference of such numbers.
template <class V> struct Pair {
  V high, low;
  INLINE double sum() const { return double(high[0]) + double(low[0]); }  // of lane 0
};

constexpr double LN2 = 0.69314718055994530942, LOG2_E = 1.442695040888963407, LOG2_E_LOW = 2.0355273740931033e-17;

constexpr double raised(double u, int power) { return power == 0 ? 1 : u * raised(u, power - 1); }

// exp(u r) - 1 for |u r| <= ln2 / 2, where u is 1, or ln2 for powers of 2. Minimax polynomials of
// (exp(r) - 1 - r) / r^2 (Remez; relative error of exp 3.1e-9 for float, 3.6e-18 for double), stretched by u.
template <class A, bool OF_2, class V> INLINE V expm1_near(V r) {
  constexpr double u = OF_2 ? LN2 : 1;
  V p;
  if constexpr (sizeof(A) == 4) {
    p = splat(A(0.00138145840312 * raised(u, 6)));
    p = p * r + A(0.00836872393598 * raised(u, 5));
    p = p * r + A(0.0416683887296 * raised(u, 4));
    p = p * r + A(0.166665205736 * raised(u, 3));
    p = p * r + A(0.499999934439 * raised(u, 2));
  } else {
    p = splat(A(2.5000050912281526053e-8 * raised(u, 11)));
    p = p * r + A(2.763026284487135397e-7 * raised(u, 10));
    p = p * r + A(2.7557586481304678554e-6 * raised(u, 9));
    p = p * r + A(0.000024801493061604863173 * raised(u, 8));
    p = p * r + A(0.00019841269506377611217 * raised(u, 7));
    p = p * r + A(0.0013888888943662552172 * raised(u, 6));
    p = p * r + A(0.008333333333494590428 * raised(u, 5));
    p = p * r + A(0.041666666666530051108 * raised(u, 4));
    p = p * r + A(0.16666666666666412269 * raised(u, 3));
    p = p * r + A(0.50000000000000106375 * raised(u, 2));
  }
  if constexpr (OF_2) return fms(r, splat(A(u)), -((r * r) * p));  // r u is the larger part: not rounded on its own
  else return r + (r * r) * p;
}

// x = n ln2 + r with |r| <= ln2 / 2: gives exp(r) - 1, and n in the low bits of t; of an x below `lowest`, anything.
// `rest` is what x was rounded by.
template <class A, class V> INLINE V expm1_reduced(V x, V rest, V* t) {
  typedef Constants<A> K;
  *t = x * A(LOG2_E) + K::round;
  const V n = *t - K::round;
  return expm1_near<A, false>((x - n * K::ln2_hi) - (n * K::ln2_lo - rest));
}

// exp of x in [lowest, 0], less t_0's power of 2. Below `lowest` 0, whatever the rest; NaN stays NaN.
template <class A, class V> INLINE V exp_above(V x, V rest, V lowest, V t_0) {
  V t;
  const V reduced = expm1_reduced<A>(x, rest, &t);
  const V result = multiply_power(reduced, t, t_0);
  return x < lowest ? V{} : result;
}

// exp of x <= 0.
template <class A, class V> INLINE V exp(V x, V rest = V{}) {
  typedef Constants<A> K;
  return exp_above<A>(x, rest, splat(K::lowest), splat(K::round));
}

// How many powers of two above its value an exponential is computed, so that it is not yet 0 where its product with
// `scale` would be: a gradient is right down to the smallest number, for any upstream gradient.
INLINE int headroom(double scale) {
  uint64_t bits;
  __builtin_memcpy(&bits, &scale, sizeof bits);
  const int power = int(bits >> 52 & 0x7ff) - 1023 + 24;  // 24: the bits of a float
  return power < 0 ? 0 : power > 96 ? 96 : power;         // so large that 2^31 classes can still be summed
}

// The same for a scale in each lane.
template <class A, class V> INLINE V headroom_of(V scale) {
  typedef Constants<A> K;
  typedef typename Integers<V>::type I;
  const I power = ((I)scale >> K::mantissa & (2 * K::bias + 1)) - (K::bias - 24);
  return __builtin_convertvector(power < 0 ? I{} : power > 96 ? I{} + 96 : power, V);
}

// exp(z - m) for z <= m and one m, but for a factor that is known to double precision: what is subtracted is a
// `shift` near m that costs no rounding. A small m leaves only a power of 2, and a large one is itself exact, since z
// is so near to it (or gives 0) that both are multiples of nearly the same digit.
template <class A> struct Shifted {
  typedef Constants<A> K;
  typedef typename Simd<A>::V V;
  static constexpr bool OF_Z = true;
  V base, base_low, lowest, t_0;
  double shift, unit;  // the factor is exp(shift - m) times this power of 2

  INLINE Shifted(double m, int headroom) {
    const bool near = __builtin_fabs(m) < K::near;
    const A b = near ? A(0) : A(m), b_low = near ? A(0) : A(m - double(b)), rest = near ? A(m) : A(0);
    const A t = rest * A(LOG2_E) + K::round;  // as in expm1_reduced
    base = splat(b), base_low = splat(m - m == 0 ? b_low : A(0));
    lowest = splat(rest + K::lowest - A(headroom * LN2));
    t_0 = splat(t - A(headroom));
    shift = double(b) + double(base_low[0]) + double(t - K::round) * LN2;
    unit = __builtin_ldexp(1.0, -headroom);
  }
  INLINE V exp(V z) const { return exp_above<A>(z - base, V{}, lowest, t_0); }
  INLINE V exp(const Pair<V>& z) const {
    // The low part of a large z is not small beside x.
    const V x = z.high - base, low = z.low - base_low, sum = x + low;
    return exp_above<A>(sum, low - (sum - x), lowest, t_0);
  }
};

// The same for z = k x and a small m, from x itself: exp(z) = 2^(x k / ln2), whose products lose no digit. Making z
// would cost more than its exponential.
template <class A> struct ShiftedPower {
  typedef Constants<A> K;
  typedef typename Simd<A>::V V;
  static constexpr bool OF_Z = false;
  Pair<V> power;  // k / ln2
  V lowest, t_0;  // of t: below, the power of 2 would not be a normal number
  double shift, unit;

  // For these x times the low part of `power` is far below 1, and what rounds `shift` is below what float64 shows.
  static INLINE bool takes(double m, double k) {
    return __builtin_fabs(m) < (sizeof(A) == 4 ? 0x1p14 : K::near) && __builtin_fabs(k) < 0x1p126;
  }
  INLINE ShiftedPower(double m, int headroom, double k) {
    const A high = A(k * LOG2_E), t = A(m) * A(LOG2_E) + K::round;
    power = {splat(high), splat(A(__builtin_fma(k, LOG2_E, -double(high)) + k * LOG2_E_LOW))};
    t_0 = splat(t - A(headroom));
    lowest = t_0 - A(K::bias - 1);
    shift = double(t - K::round) * LN2;
    unit = __builtin_ldexp(1.0, -headroom);
  }
  INLINE V exp(V x) const {
    const V t = x * power.high + K::round, r = fms(x, power.high, t - K::round) + x * power.low;
    const V result = multiply_power(expm1_near<A, true>(r), t, t_0);
    return t < lowest ? V{} : result;
  }
};

// exp(z - m) for z <= m of rows in lanes, each with its m, in units of `unit`, a power of 2. Rounding z - m would cost
// exp a relative |z - m| 2^-24, 25 ULP at -50: the rounded-off part is given back (Knuth's two-sum). A shift as above
// would leave a factor in each lane, rounded in acc: the largest logit's exponential would not be exactly 1 any more.
template <class A> struct MinusLanes {
  typedef Constants<A> K;
  typedef typename Simd<A>::V V;
  Pair<V> m;
  V lowest, t_0, unit;

  MinusLanes() = default;
  INLINE MinusLanes(const Pair<V>& m, V headroom)
      : m(m),
        lowest(K::lowest - headroom * A(LN2)),
        t_0(K::round - headroom),
        unit(multiply_power(V{}, t_0, splat(K::round))) {}
  INLINE V exp(const Pair<V>& z, bool changed) const {
    const V d = z.high - m.high, minus_m = d - z.high;
    V rest = (z.high - (d - minus_m)) - (m.high + minus_m);
    if (!changed) return exp_above<A>(d, rest, lowest, t_0);
    rest += z.low - m.low;
    const V sum = d + rest;  // the low part of a large z is not small beside d
    const V result = exp_above<A>(sum, rest - (sum - d), lowest, t_0);
    return d < lowest ? V{} : result;  // minus infinity has no rest
  }
};

// total += part; what that rounds off is kept in `lost` for the next addition (Neumaier).
template <class V> INLINE void add(V& total, V& lost, V part) {
  part += lost;
  const V sum = total + part;
  lost = sum - sum == 0 ? part - (sum - total) : V{};  // inf - inf would be NaN
  total = sum;
}

// tanh(u) = -em1 / (2 + em1) with em1 = exp(-2 |u|) - 1: no cancellation near 0.
template <class A, class V> INLINE V tanh(V u) {
  typedef Constants<A> K;
  V x = u < 0 ? 2 * u : -2 * u;
  V clamped = x < K::lowest ? splat(K::lowest) : x;
  V t;
  const V reduced = expm1_reduced<A>(clamped, V{}, &t), power = multiply_power(V{}, t, splat(K::round));
  const V em1 = power * reduced + (power - 1);
  V magnitude = -em1 / (2 + em1);
  return u < 0 ? -magnitude : magnitude;
}

// log(1 + u) for u >= 0, or NaN: 1 + u = 2^n f with f in [sqrt(1/2), sqrt(2)), and log f = 2 atanh(g / (2 + g)) with
// g = f - 1. For n = 0 g is u itself, so a tiny u keeps every digit; for others what 1 + u rounded off is added back.
template <class A, class V, class I> INLINE V log1p(V u) {
  typedef Constants<A> K;
  const V v = 1 + u;
  const I sqrt_half = (I)splat(A(0.70710678118654752440));
  const I exponent = ((I)v - sqrt_half) >> K::mantissa;
  const V n = __builtin_convertvector(exponent, V);
  const V f = (V)((I)v - (exponent << K::mantissa));
  const V g = exponent == 0 ? u : f - 1;
  const V ratio = g / (2 + g), square = ratio * ratio;
  V p;
  if constexpr (sizeof(A) == 4) {
    p = splat(A(2.0 / 9));
    p = p * square + A(2.0 / 7);
    p = p * square + A(2.0 / 5);
    p = p * square + A(2.0 / 3);
  } else {
    p = splat(A(2.0 / 23));
    for (int odd = 21; odd >= 3; odd -= 2) p = p * square + A(2.0) / A(odd);
  }
  const V rounded_off = exponent == 0 ? V{} : (u - (v - 1)) / v;
  const V result = n * K::ln2_hi + (2 * ratio + (ratio * square * p + (n * K::ln2_lo + rounded_off)));
  return u < K::infinity ? result : u;
}

// The same names for one number and for a vector.
INLINE double exp_of(double x) { return __builtin_exp(x); }
INLINE double log1p_of(double u) { return __builtin_log1p(u); }
INLINE Vec::f32 exp_of(Vec::f32 x) { return exp<float>(x); }
INLINE Vec::f64 exp_of(Vec::f64 x) { return exp<double>(x); }
INLINE Vec::f32 log1p_of(Vec::f32 u) { return log1p<float, Vec::f32, Vec::i32>(u); }
INLINE Vec::f64 log1p_of(Vec::f64 u) { return log1p<double, Vec::f64, Vec::i64>(u); }
INLINE double infinity_of(double) { return __builtin_inf(); }
INLINE Vec::f32 infinity_of(Vec::f32) { return splat(__builtin_inff()); }
INLINE Vec::f64 infinity_of(Vec::f64) { return splat(__builtin_inf()); }

// Not through memory: a wide load right after two narrow stores defeats store forwarding.
INLINE Vec::f32 join(Vec::f32_half a, Vec::f32_half b) {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (Vec::f32)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)a), (__m256)b, 1);
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
  return (Vec::f32)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)a), (__m128)b, 1);
#else
  Vec::f32 result;
  __builtin_memcpy(&result, &a, sizeof a);
  __builtin_memcpy(reinterpret_cast<char*>(&result) + sizeof a, &b, sizeof b);
  return result;
#endif
}

// f of every lane in double, and what is lost on the way back.
template <class Function> INLINE Pair<Vec::f64> in_double(Vec::f64 x, Function f) { return {f(x), Vec::f64{}}; }
template <class Function> INLINE Pair<Vec::f32> in_double(Vec::f32 x, Function f) {
  Vec::f32_half part[2], low[2];
  __builtin_memcpy(part, &x, sizeof x);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const Vec::f64 exact = f(__builtin_convertvector(part[i], Vec::f64));
    part[i] = __builtin_convertvector(exact, Vec::f32_half);
    const Vec::f64 rest = exact - __builtin_convertvector(part[i], Vec::f64);
    low[i] = __builtin_convertvector(rest - rest == 0 ? rest : Vec::f64{}, Vec::f32_half);  // inf - inf would be NaN
  }
  return {join(part[0], part[1]), join(low[0], low[1])};
}

// x k, and what it is rounded by.
INLINE Pair<Vec::f64> product(Vec::f64 x, double k) { return {x * k, Vec::f64{}}; }
INLINE Pair<Vec::f32> product(Vec::f32 x, double k) {
  if constexpr (!HAS_FMS) return in_double(x, [&](Vec::f64 x_c) LAMBDA { return x_c * k; });
  const float high = float(k), low = float(k - double(high));
  const Vec::f32 p = x * high, rest = fms(x, splat(high), p) + x * low;
  const Vec::f32 sum = p + rest, lost = rest - (sum - p);  // rest may be a digit of p
  // Both together fit a double, as m has to: a digit of a large z that m did not have would be beyond exp.
  const Vec::f32 digit = sum * 0x1p-28f, low_part = (lost + digit) - digit;
  return {sum - sum == 0 ? sum : p, low_part - low_part == 0 ? low_part : Vec::f32{}};  // inf - inf would be NaN
}

// 1 / cosh(u)^2 = 4 E / (1 + E)^2 with E = exp(-2 |u|): no cancellation where tanh nears 1.
template <class A, class V> INLINE V sech2(Pair<V> u) {
  const V twice = 2 * u.high, E = exp<A>(u.high < 0 ? twice : -twice, 2 * (u.high < 0 ? u.low : -u.low));
  return 4 * E / ((1 + E) * (1 + E));
}
