// What is kept of rows in columns of doubles, and a table's entry for each lane: a row in each lane of a vector.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

// The first n of a column of doubles, and back.
INLINE Pair<Vec::f64> from_doubles(Vec::f64, const double* p, int n) { return {load_first(p, n), Vec::f64{}}; }
INLINE Pair<Vec::f32> from_doubles(Vec::f32, const double* p, int n) {
  constexpr int half = lanes_of<Vec::f64>;
  Vec::f32_half high[2], low[2];
  for (int i = 0; i < 2; i++) {
    const int count = n < i * half ? 0 : n - i * half < half ? n - i * half : half;
    const Vec::f64 exact = count == half ? load(p + i * half) : load_first(p + i * half, count);
    high[i] = __builtin_convertvector(exact, Vec::f32_half);
    const Vec::f64 rest = exact - __builtin_convertvector(high[i], Vec::f64);
    low[i] = __builtin_convertvector(rest - rest == 0 ? rest : Vec::f64{}, Vec::f32_half);
  }
  return {join(high[0], high[1]), join(low[0], low[1])};
}
INLINE void to_doubles(double* p, const Pair<Vec::f64>& v, int n) { store_first(p, v.high, n); }
INLINE void to_doubles(double* p, const Pair<Vec::f32>& v, int n) {
  constexpr int half = lanes_of<Vec::f64>;
  Vec::f32_half high[2], low[2];
  __builtin_memcpy(high, &v.high, sizeof high);
  __builtin_memcpy(low, &v.low, sizeof low);
  for (int i = 0; i < 2; i++) {
    const int count = n < i * half ? 0 : n - i * half < half ? n - i * half : half;
    const Vec::f64 exact = __builtin_convertvector(high[i], Vec::f64) + __builtin_convertvector(low[i], Vec::f64);
    if (count == half) store(p + i * half, exact);
    else store_first(p + i * half, exact, count);
  }
}

// The first n of a column of whole numbers kept as doubles; p[y] of each lane.
INLINE Vec::i64 from_doubles(Vec::i64, const double* p, int n) {
  return __builtin_convertvector(load_first(p, n), Vec::i64);
}
INLINE Vec::i32 from_doubles(Vec::i32, const double* p, int n) {
  constexpr int half = lanes_of<Vec::f64>;
  Vec::f32_half part[2];
  for (int i = 0; i < 2; i++) {
    const int count = n < i * half ? 0 : n - i * half < half ? n - i * half : half;
    part[i] = (Vec::f32_half) __builtin_convertvector(load_first(p + i * half, count), Vec::i32_half);
  }
  return (Vec::i32)join(part[0], part[1]);
}
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
INLINE Vec::f32 gather(const float* p, Vec::i32 y) { return (Vec::f32)_mm512_i32gather_ps((__m512i)y, p, 4); }
INLINE Vec::f64 gather(const double* p, Vec::i64 y) { return (Vec::f64)_mm512_i64gather_pd((__m512i)y, p, 8); }
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
INLINE Vec::f32 gather(const float* p, Vec::i32 y) { return (Vec::f32)_mm256_i32gather_ps(p, (__m256i)y, 4); }
INLINE Vec::f64 gather(const double* p, Vec::i64 y) { return (Vec::f64)_mm256_i64gather_pd(p, (__m256i)y, 8); }
#else
template <class A, class I> INLINE auto gather(const A* p, I y) {
  typename Simd<A>::V result;
  for (int i = 0; i < lanes_of<I>; i++) result[i] = p[y[i]];
  return result;
}
#endif
