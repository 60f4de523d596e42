// Between memory and vectors: whole vectors and first lanes, 16-bit numbers, and elements that lie apart.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

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

// ---- past the caches: a store that does not read what it overwrites first

// How many of n elements come before the first that a whole vector may be streamed to.
template <class T> INLINE int64_t to_stream(const T* p, int64_t n) {
  constexpr int64_t lanes = Constants<typename Simd<T>::A>::lanes;
  const int64_t before = -int64_t(reinterpret_cast<uintptr_t>(p) / sizeof(T)) & (lanes - 1);
  return before < n ? before : n;
}
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
INLINE void stream_end() { _mm_sfence(); }
INLINE void stream_bits(void* p, Vec::u32 v) { _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v); }
INLINE void stream_bits(void* p, Vec::u16 v) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v); }
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
INLINE void stream_end() { _mm_sfence(); }
INLINE void stream_bits(void* p, Vec::u32 v) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v); }
INLINE void stream_bits(void* p, Vec::u16 v) { _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v); }
#else
INLINE void stream_end() {}
template <class V> INLINE void stream_bits(void* p, V v) { write(p, v); }
#endif
INLINE void stream(float* p, Vec::f32 v) { stream_bits(p, (Vec::u32)v); }
INLINE void stream(double* p, Vec::f64 v) { stream_bits(p, (Vec::u32)v); }
template <class Half> INLINE void stream(Half* p, Vec::f32 v) {
  Half narrowed[Constants<float>::lanes];
  store(narrowed, v);
  stream_bits(p, read<Vec::u16>(narrowed));
}

// ---- p[y] of each lane

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

// ---- n elements of a dtype known at run time, `stride` apart, from and to acc

template <class A, class T>
INLINE void read_strided(A* out, const void* data, int64_t offset, int64_t stride, int64_t n) {
  const T* p = static_cast<const T*>(data) + offset;
  constexpr int lanes = Constants<typename Simd<T>::A>::lanes;
  for (int64_t i = 0; i < n; i += lanes) {
    const int64_t count = n - i < lanes ? n - i : lanes;
    if constexpr (sizeof(A) == sizeof(typename Simd<T>::A))
      if (stride == 1) {
        if (count == lanes) store(out + i, load(p + i));
        else store_first(out + i, load_first(p + i, count), count);
        continue;
      }
    T element[lanes] = {};
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
  constexpr int lanes = Constants<typename Simd<T>::A>::lanes;
  for (int64_t i = 0; i < n; i += lanes) {
    const int64_t count = n - i < lanes ? n - i : lanes;
    if constexpr (sizeof(A) == sizeof(typename Simd<T>::A))
      if (stride == 1) {
        if (count == lanes) store(p + i, load(in + i));
        else store_first(p + i, load_first(in + i, count), count);
        continue;
      }
    T element[lanes];
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
