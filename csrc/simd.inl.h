// A vector of VECTOR_BYTES bytes: load, store, max, sum, exp, tanh. GCC and clang vector extensions only, so the
// operators read like the mathematics; the compiler picks the instructions of the file's instruction set.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

template <int bytes> struct Vectors;
template <> struct Vectors<VECTOR_BYTES> {
  typedef float f32 __attribute__((vector_size(VECTOR_BYTES)));
  typedef float f32_half __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef int32_t i32 __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t u32 __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint16_t u16 __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef double f64 __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t i64 __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint64_t u64 __attribute__((vector_size(VECTOR_BYTES)));
};
typedef Vectors<VECTOR_BYTES> Vec;

#define INLINE inline __attribute__((always_inline))

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// Element type -> accumulation type, vector of it, integer vector of the same lanes.
template <class T> struct Simd {
  typedef float A;
  typedef Vec::f32 V;
  typedef Vec::i32 I;
};
template <> struct Simd<double> {
  typedef double A;
  typedef Vec::f64 V;
  typedef Vec::i64 I;
};

#if VECTOR_BYTES == 64 && defined(__AVX512F__)
constexpr bool lowest_is_0 = true;  // see scale
#else
constexpr bool lowest_is_0 = false;
#endif

template <class A> struct Constants;
template <> struct Constants<float> {
  static constexpr int lanes = VECTOR_BYTES / 4, mantissa = 23, bias = 127;
  static constexpr float round = 0x1.8p23f, near = 256, infinity = __builtin_inff();
  static constexpr float lowest =
      lowest_is_0 ? -105 : -87.3f;  // sqrt(2) exp of it is 0; or exp about the smallest normal
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;  // few bits in hi: n * ln2_hi is exact
};
template <> struct Constants<double> {
  static constexpr int lanes = VECTOR_BYTES / 8, mantissa = 52, bias = 1023;
  static constexpr double round = 0x1.8p52, near = 2048, infinity = __builtin_inf();
  static constexpr double lowest = lowest_is_0 ? -746 : -708.3;
  static constexpr double ln2_hi = 0x1.62e42feep-1, ln2_lo = 0x1.a39ef35793c76p-33;
};

INLINE Vec::f32 splat(float x) { return x - Vec::f32{}; }
INLINE Vec::f64 splat(double x) { return x - Vec::f64{}; }

// b where either is NaN.
template <class V> INLINE V max(V a, V b) { return a > b ? a : b; }
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
// g++ 12 sees no maximum where a is made on the way, as from 16 bits, and lets the next one wait for a mask.
INLINE Vec::f32 max(Vec::f32 a, Vec::f32 b) { return (Vec::f32)_mm512_max_ps((__m512)a, (__m512)b); }
#endif

// ---- lanes change places

template <int... i> struct Order {};
template <int n, int... i> struct Count : Count<n - 1, n - 1, i...> {};
template <int... i> struct Count<0, i...> { typedef Order<i...> type; };
template <class V> constexpr int lanes_of = sizeof(V) / sizeof(V{}[0]);
template <class V> using InOrder = typename Count<lanes_of<V>>::type;
template <class V> struct Integers;
template <> struct Integers<Vec::f32> {
  typedef Vec::i32 type;
  typedef Vec::u32 bits;
};
template <> struct Integers<Vec::f64> {
  typedef Vec::i64 type;
  typedef Vec::u64 bits;
};

// Lane j of the result is lane order[j] of a followed by b.
template <class V, int... order> INLINE V pick(V a, V b, Order<order...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, order...);
#else
  return __builtin_shuffle(a, b, typename Integers<V>::type{order...});
#endif
}
template <int by, class V, int... i> INLINE V rotate(V v, Order<i...>) {
  return pick(v, v, Order<(i + by) % lanes_of<V>...>{});
}
template <int half, class V, int... i> INLINE V zip(V a, V b, Order<i...>) {  // the low (0) or high (1) halves
  return pick(a, b, Order<(half * lanes_of<V> + i) / 2 + i % 2 * lanes_of<V>...>{});
}

// As many vectors as lanes. Pack expansions rather than loops: g++ keeps in memory what a loop indexes.
template <class V> struct Tile { V v[lanes_of<V>]; };
template <class V, int... i> INLINE Tile<V> zip_halves(const Tile<V>& t, Order<i...> order) {
  return {{zip<i % 2>(t.v[i / 2], t.v[(i + lanes_of<V>) / 2], order)...}};
}
// v[i] lane j becomes v[j] lane i. Zipping the first half with the second makes the highest bit of a vector's number
// the lowest of a lane's; after as many rounds as a number has bits, the two have changed places.
template <int rounds, class V> INLINE Tile<V> transpose(const Tile<V>& t) {
  if constexpr (rounds == 1) return t;
  else return transpose<rounds / 2>(zip_halves(t, InOrder<V>{}));
}
template <class V> INLINE Tile<V> transpose(const Tile<V>& t) { return transpose<lanes_of<V>>(t); }

// f(v, v rotated) until one lane has seen all.
template <int by, class V, class Function> INLINE V fold(V v, Function f) {
  if constexpr (by == 0) return v;
  else return fold<by / 2>(f(v, rotate<by>(v, InOrder<V>{})), f);
}
template <class A, class V> INLINE A lane_max(V v) {
  return fold<lanes_of<V> / 2>(v, [](V a, V b) { return max(a, b); })[0];
}
// All lanes of both, added in double.
INLINE double lane_sum(Vec::f64 a, Vec::f64 b) {
  return fold<lanes_of<Vec::f64> / 2>(a + b, [](Vec::f64 a, Vec::f64 b) { return a + b; })[0];
}
INLINE double lane_sum(Vec::f32 a, Vec::f32 b) {
  Vec::f32_half part[4];
  __builtin_memcpy(part, &a, sizeof a);
  __builtin_memcpy(part + 2, &b, sizeof b);
  return lane_sum(__builtin_convertvector(part[0], Vec::f64) + __builtin_convertvector(part[2], Vec::f64),
                  __builtin_convertvector(part[1], Vec::f64) + __builtin_convertvector(part[3], Vec::f64));
}

// ---- load and store: 16-bit elements widen to float on the way in and round to nearest even on the way out

template <class W> INLINE W read(const void* p) {
  W value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}
template <class W> INLINE void write(void* p, W value) { __builtin_memcpy(p, &value, sizeof value); }

INLINE Vec::f32 load(const float* p) { return read<Vec::f32>(p); }
INLINE Vec::f64 load(const double* p) { return read<Vec::f64>(p); }
INLINE void store(float* p, Vec::f32 v) { write(p, v); }
INLINE void store(double* p, Vec::f64 v) { write(p, v); }

// g++ 12 converts these a half or a quarter at a time.
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
INLINE Vec::u32 widen(Vec::u16 v) { return (Vec::u32)_mm512_cvtepu16_epi32((__m256i)v); }
INLINE Vec::u16 narrow(Vec::u32 v) { return (Vec::u16)_mm512_cvtepi32_epi16((__m512i)v); }
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
INLINE Vec::u32 widen(Vec::u16 v) { return (Vec::u32)_mm256_cvtepu16_epi32((__m128i)v); }
INLINE Vec::u16 narrow(Vec::u32 v) {
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (Vec::u16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8));
}
#else
INLINE Vec::u32 widen(Vec::u16 v) { return __builtin_convertvector(v, Vec::u32); }
INLINE Vec::u16 narrow(Vec::u32 v) { return __builtin_convertvector(v, Vec::u16); }
#endif

INLINE Vec::f32 load(const bfloat16* p) { return (Vec::f32)(widen(read<Vec::u16>(p)) << 16); }
INLINE void store(bfloat16* p, Vec::f32 v) {
  Vec::u32 bits = (Vec::u32)v;
  Vec::u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // Rounding could carry a NaN into infinity or zero.
  write(p, narrow(v == v ? rounded : Vec::u32{} + 0x7fc0));
}

#if VECTOR_BYTES == 64 && defined(__AVX512F__)
INLINE Vec::f32 load(const float16* p) { return (Vec::f32)_mm512_cvtph_ps(read<__m256i>(p)); }
INLINE void store(float16* p, Vec::f32 v) { write(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif VECTOR_BYTES == 32 && defined(__F16C__)
INLINE Vec::f32 load(const float16* p) { return (Vec::f32)_mm256_cvtph_ps(read<__m128i>(p)); }
INLINE void store(float16* p, Vec::f32 v) { write(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
// Without a conversion instruction: exponents are rebased by a multiplication, which is exact and also brings
// float16 subnormals to where float32 can hold them.
INLINE Vec::f32 load(const float16* p) {
  Vec::u32 h = widen(read<Vec::u16>(p));
  Vec::f32 magnitude = (Vec::f32)((h & 0x7fff) << 13) * 0x1p112f;
  Vec::u32 not_finite = (Vec::u32)((h & 0x7c00) == 0x7c00);
  return (Vec::f32)((Vec::u32)magnitude | (not_finite & 0x7f800000) | ((h & 0x8000) << 16));
}
INLINE void store(float16* p, Vec::f32 v) {
  Vec::u32 sign = (Vec::u32)v & 0x80000000;
  Vec::u32 bits = (Vec::u32)v ^ sign;
  // normal: round the 13 dropped bits to even; subnormal: adding 0.5 lets the adder round at 2^-24
  Vec::u32 normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  Vec::u32 tiny = (Vec::u32)((Vec::f32)bits + 0.5f) - 0x3f000000;
  Vec::u32 is_tiny = (Vec::u32)(bits < 0x38800000), is_huge = (Vec::u32)(bits >= 0x477ff000);
  Vec::u32 is_nan = (Vec::u32)(bits > 0x7f800000);
  Vec::u32 h = (is_tiny & tiny) | (~is_tiny & normal);
  h = (is_huge & 0x7c00) | (~is_huge & h);
  h = (is_nan & 0x7e00) | (~is_nan & h) | (sign >> 16);
  write(p, narrow(h));
}
#endif

// The first n <= lanes elements; lanes past them hold zeros.
template <class T> INLINE typename Simd<T>::V load_first(const T* p, int64_t n) {
  T padded[Constants<typename Simd<T>::A>::lanes] = {};
  for (int64_t i = 0; i < n; i++) padded[i] = p[i];
  return load(padded);
}
template <class T> INLINE void store_first(T* p, typename Simd<T>::V v, int64_t n) {
  T padded[Constants<typename Simd<T>::A>::lanes];
  store(padded, v);
  for (int64_t i = 0; i < n; i++) p[i] = padded[i];
}
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
// A mask in place of the loop.
INLINE Vec::f32 load_first(const float* p, int64_t n) {
  return (Vec::f32)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
INLINE Vec::f64 load_first(const double* p, int64_t n) {
  return (Vec::f64)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
INLINE void store_first(float* p, Vec::f32 v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
INLINE void store_first(double* p, Vec::f64 v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
template <class Half> INLINE Vec::f32 load_first_half(const Half* p, int64_t n) {
  Half padded[Constants<float>::lanes];
  write(padded, _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
  return load(padded);
}
template <class Half> INLINE void store_first_half(Half* p, Vec::f32 v, int64_t n) {
  Half padded[Constants<float>::lanes];
  store(padded, v);
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), read<__m256i>(padded));
}
INLINE Vec::f32 load_first(const bfloat16* p, int64_t n) { return load_first_half(p, n); }
INLINE Vec::f32 load_first(const float16* p, int64_t n) { return load_first_half(p, n); }
INLINE void store_first(bfloat16* p, Vec::f32 v, int64_t n) { store_first_half(p, v, n); }
INLINE void store_first(float16* p, Vec::f32 v, int64_t n) { store_first_half(p, v, n); }
#endif

template <class I, int... i> INLINE I lane_numbers(Order<i...>) { return I{i...}; }

// v in the first n lanes, fill in the others.
template <class A, class V> INLINE V keep_first(V v, int64_t n, A fill) {
  typedef typename Integers<V>::type I;
  return lane_numbers<I>(InOrder<V>{}) < decltype(I{}[0] + 0)(n) ? v : splat(fill);
}
template <class I> INLINE I lane_is(int64_t i) { return lane_numbers<I>(InOrder<I>{}) == decltype(I{}[0] + 0)(i); }

// ---- n elements of a dtype known at run time, `stride` apart, from and to acc

template <class A, class T>
INLINE void read_strided(A* out, const void* data, int64_t offset, int64_t stride, int64_t n) {
  const T* p = static_cast<const T*>(data) + offset;
  constexpr int L = Constants<typename Simd<T>::A>::lanes;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t count = n - i < L ? n - i : L;
    if constexpr (sizeof(A) == sizeof(typename Simd<T>::A))
      if (stride == 1 && count == L) {
        store(out + i, load(p + i));
        continue;
      }
    T element[L] = {};
    for (int64_t j = 0; j < count; j++) element[j] = p[(i + j) * stride];
    const auto v = load(element);
    for (int64_t j = 0; j < count; j++) out[i + j] = A(v[j]);
  }
}
template <class A>
void read_elements(A* out, const void* data, DType dtype, int64_t offset, int64_t stride, int64_t n) {
  switch (dtype) {
    case DType::float32: return read_strided<A, float>(out, data, offset, stride, n);
    case DType::float64: return read_strided<A, double>(out, data, offset, stride, n);
    case DType::bfloat16: return read_strided<A, bfloat16>(out, data, offset, stride, n);
    default: return read_strided<A, float16>(out, data, offset, stride, n);
  }
}

template <class A, class T>
INLINE void write_strided(void* data, int64_t offset, int64_t stride, const A* in, int64_t n) {
  T* p = static_cast<T*>(data) + offset;
  constexpr int L = Constants<typename Simd<T>::A>::lanes;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t count = n - i < L ? n - i : L;
    T element[L];
    typename Simd<T>::V v = {};
    for (int64_t j = 0; j < count; j++) v[j] = in[i + j];
    store(element, v);
    for (int64_t j = 0; j < count; j++) p[(i + j) * stride] = element[j];
  }
}
template <class A>
void write_elements(void* data, DType dtype, int64_t offset, int64_t stride, const A* in, int64_t n) {
  switch (dtype) {
    case DType::float32: return write_strided<A, float>(data, offset, stride, in, n);
    case DType::float64: return write_strided<A, double>(data, offset, stride, in, n);
    case DType::bfloat16: return write_strided<A, bfloat16>(data, offset, stride, in, n);
    default: return write_strided<A, float16>(data, offset, stride, in, n);
  }
}

// ---- exp and tanh

// 2^n (1 + q), for t that holds n and t_0 that holds 0 in its low bits. Multiplied by processors that can, which is
// right down to the smallest subnormal; elsewhere n goes where the exponent stands.
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
INLINE Vec::f32 scale(Vec::f32 q, Vec::f32 t, Vec::f32 t_0) {
  return (Vec::f32)_mm512_scalef_ps((__m512)(1 + q), (__m512)(t - t_0));
}
INLINE Vec::f64 scale(Vec::f64 q, Vec::f64 t, Vec::f64 t_0) {
  return (Vec::f64)_mm512_scalef_pd((__m512d)(1 + q), (__m512d)(t - t_0));
}
#else
template <class V> INLINE V scale(V q, V t, V t_0) {
  typedef typename Integers<V>::bits U;  // a NaN's bits may overflow
  typedef Constants<decltype(V{}[0] + 0)> K;
  const V power = (V)(((U)t - (U)t_0 + K::bias) << K::mantissa);
  return power + power * q;
}
#endif

// x = n ln2 + r with |r| <= ln2 / 2: gives exp(r) - 1, and n in the low bits of t. Minimax polynomials of
// (exp(r) - 1 - r) / r^2 (Remez; relative error of exp 3.1e-9 for float, 3.6e-18 for double). x >= lowest, or NaN.
// `rest` is what x was rounded by.
template <class A, class V> INLINE V expm1_reduced(V x, V rest, V* t) {
  typedef Constants<A> K;
  *t = x * A(1.442695040888963407) + K::round;
  const V n = *t - K::round;
  const V r = (x - n * K::ln2_hi) - (n * K::ln2_lo - rest);
  V p;
  if constexpr (sizeof(A) == 4) {
    p = splat(A(0.00138145840312));
    p = p * r + A(0.00836872393598);
    p = p * r + A(0.0416683887296);
    p = p * r + A(0.166665205736);
    p = p * r + A(0.499999934439);
  } else {
    p = splat(A(2.5000050912281526053e-8));
    p = p * r + A(2.763026284487135397e-7);
    p = p * r + A(2.7557586481304678554e-6);
    p = p * r + A(0.000024801493061604863173);
    p = p * r + A(0.00019841269506377611217);
    p = p * r + A(0.0013888888943662552172);
    p = p * r + A(0.008333333333494590428);
    p = p * r + A(0.041666666666530051108);
    p = p * r + A(0.16666666666666412269);
    p = p * r + A(0.50000000000000106375);
  }
  return r + (r * r) * p;
}

// exp of x in [lowest, 0], less t_0's power of 2. Below `lowest` 0; NaN stays NaN.
template <class A, class V> INLINE V exp_above(V x, V rest, V lowest, V t_0) {
  V t;
  const V q = expm1_reduced<A>(x < lowest ? lowest : x, rest, &t);
  const V result = scale(q, t, t_0);
  return lowest_is_0 ? result : x < lowest ? V{} : result;
}

// exp of x <= 0.
template <class A, class V> INLINE V exp(V x, V rest = V{}) {
  typedef Constants<A> K;
  return exp_above<A>(x, rest, splat(K::lowest), splat(K::round));
}

// exp(z - m) for z <= m, a lane's m its own. Rounding z - m would cost exp a relative |z - m| 2^-24, 25 ULP at -50: the
// rounded-off part is given back (Knuth's two-sum).
template <class A, class V> INLINE V exp_minus(V z, V m) {
  const V d = z - m, minus_m = d - z;
  const V result = exp<A>(d, (z - (d - minus_m)) - (m + minus_m));
  return d < Constants<A>::lowest ? V{} : result;  // minus infinity has no rest
}

// exp(z - m) for z <= m and one m, but for a factor that is known to double precision: what is subtracted is a
// `shift` near m that costs no rounding. A small m leaves only a power of 2, and a large one is itself exact, since z
// is so near to it (or gives 0) that both are multiples of nearly the same digit.
template <class A> struct Shifted {
  typedef Constants<A> K;
  typedef typename Simd<A>::V V;
  V base, lowest, t_0;
  double shift;

  INLINE explicit Shifted(A m) {
    const A b = __builtin_fabs(m) < K::near ? A(0) : m, rest = m - b;
    const A t = rest * A(1.442695040888963407) + K::round;  // as in expm1_reduced
    base = splat(b), lowest = splat(rest + K::lowest), t_0 = splat(t);
    shift = double(b) + double(t - K::round) * 0.69314718055994530942;
  }
  INLINE V exp(V z) const { return exp_above<A>(z - base, V{}, lowest, t_0); }
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
  const V q = expm1_reduced<A>(clamped, V{}, &t), power = scale(V{}, t, splat(K::round));
  const V em1 = power * q + (power - 1);
  V magnitude = -em1 / (2 + em1);
  return u < 0 ? -magnitude : magnitude;
}

// 1 / cosh(u)^2 = 4 e / (1 + e)^2 with e = exp(-2 |u|): no cancellation where tanh nears 1.
template <class A, class V> INLINE V sech2(V u) {
  V e = exp<A>(u < 0 ? 2 * u : -2 * u);
  return 4 * e / ((1 + e) * (1 + e));
}

// log(1 + u) for u >= 0, or NaN: 1 + u = 2^k f with f in [sqrt(1/2), sqrt(2)), and log f = 2 atanh(g / (2 + g)) with
// g = f - 1. For k = 0 g is u itself, so a tiny u keeps every digit; for others what 1 + u rounded off is added back.
template <class A, class V, class I> INLINE V log1p(V u) {
  typedef Constants<A> K;
  const V v = 1 + u;
  const I sqrt_half = (I)splat(A(0.70710678118654752440));
  const I exponent = ((I)v - sqrt_half) >> K::mantissa;
  const V k = __builtin_convertvector(exponent, V);
  const V f = (V)((I)v - (exponent << K::mantissa));
  const V g = exponent == 0 ? u : f - 1;
  const V s = g / (2 + g), t = s * s;
  V p;
  if constexpr (sizeof(A) == 4) {
    p = splat(A(2.0 / 9));
    p = p * t + A(2.0 / 7);
    p = p * t + A(2.0 / 5);
    p = p * t + A(2.0 / 3);
  } else {
    p = splat(A(2.0 / 23));
    for (int n = 21; n >= 3; n -= 2) p = p * t + A(2.0) / A(n);
  }
  const V rounded_off = exponent == 0 ? V{} : (u - (v - 1)) / v;
  const V result = k * K::ln2_hi + (2 * s + (s * t * p + (k * K::ln2_lo + rounded_off)));
  return u < K::infinity ? result : u;
}

// The same names for one number and for a vector.
INLINE double exp_of(double x) { return __builtin_exp(x); }
INLINE double log1p_of(double u) { return __builtin_log1p(u); }
INLINE Vec::f32 exp_of(Vec::f32 x) { return exp<float>(x); }
INLINE Vec::f64 exp_of(Vec::f64 x) { return exp<double>(x); }
INLINE Vec::f32 log1p_of(Vec::f32 u) { return log1p<float, Vec::f32, Vec::i32>(u); }
INLINE Vec::f64 log1p_of(Vec::f64 u) { return log1p<double, Vec::f64, Vec::i64>(u); }
