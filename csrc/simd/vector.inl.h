// A vector of VECTOR_BYTES bytes: its types, its lanes, maxima and sums over them. GCC and clang vector extensions, so
// that the operators read like the mathematics; the compiler picks the instructions of the file's instruction set.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

template <int bytes> struct Vectors;
template <> struct Vectors<VECTOR_BYTES> {
  typedef float f32 __attribute__((vector_size(VECTOR_BYTES)));
  typedef float f32_half __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef int32_t i32 __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t i32_half __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef uint32_t u32 __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint16_t u16 __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef double f64 __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t i64 __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint64_t u64 __attribute__((vector_size(VECTOR_BYTES)));
};
typedef Vectors<VECTOR_BYTES> Vec;

#define INLINE inline __attribute__((always_inline))
#define LAMBDA __attribute__((always_inline))

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

template <class A> struct Constants;
template <> struct Constants<float> {
  static constexpr int lanes = VECTOR_BYTES / 4, mantissa = 23, bias = 127;
  static constexpr float round = 0x1.8p23f, near = 256, infinity = __builtin_inff();
  static constexpr float lowest = -87.3f;  // its exp is about the smallest normal number
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;  // few bits in hi: n * ln2_hi is exact
};
template <> struct Constants<double> {
  static constexpr int lanes = VECTOR_BYTES / 8, mantissa = 52, bias = 1023;
  static constexpr double round = 0x1.8p52, near = 2048, infinity = __builtin_inf();
  static constexpr double lowest = -708.3;
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

// a x b - c in one rounding, where the processor can.
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
constexpr bool HAS_FMS = true;
INLINE Vec::f32 fms(Vec::f32 a, Vec::f32 b, Vec::f32 c) {
  return (Vec::f32)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE Vec::f64 fms(Vec::f64 a, Vec::f64 b, Vec::f64 c) {
  return (Vec::f64)_mm512_fmsub_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif VECTOR_BYTES == 32 && defined(__FMA__)
constexpr bool HAS_FMS = true;
INLINE Vec::f32 fms(Vec::f32 a, Vec::f32 b, Vec::f32 c) {
  return (Vec::f32)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE Vec::f64 fms(Vec::f64 a, Vec::f64 b, Vec::f64 c) {
  return (Vec::f64)_mm256_fmsub_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
constexpr bool HAS_FMS = false;
template <class V> INLINE V fms(V a, V b, V c) { return a * b - c; }
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

template <class I, int... i> INLINE I lane_numbers(Order<i...>) { return I{i...}; }

// v in the first n lanes, fill in the others.
template <class A, class V> INLINE V keep_first(V v, int64_t n, A fill) {
  typedef typename Integers<V>::type I;
  return lane_numbers<I>(InOrder<V>{}) < decltype(I{}[0] + 0)(n) ? v : splat(fill);
}
template <class I> INLINE I lane_is(int64_t i) { return lane_numbers<I>(InOrder<I>{}) == decltype(I{}[0] + 0)(i); }
