// The functions of formula.py, same names, same letters, same order, for vectors. What differs is the machine: the
// lanes of a vector are classes of one row (along.inl.h) or rows side by side (across.inl.h), and what is known of a
// row is a double in the first case and a vector in the second. Included inside a namespace, once for each instruction
// set: nothing may be #included here.

// What is settled at compile time: the element type, whether z is more than x (CHANGED: a scale or a softcap), whether
// q is more than one class.
template <class T_, bool CHANGED_, bool DENSE_> struct Traits {
  typedef T_ T;
  typedef typename Simd<T>::A A;
  typedef typename Simd<T>::V V;
  typedef typename Simd<T>::I I;
  static constexpr bool CHANGED = CHANGED_, DENSE = DENSE_;
  static constexpr int lanes = Constants<A>::lanes;
};

#define TYPES(F) \
  typedef typename F::T T; \
  typedef typename F::A A; \
  typedef typename F::V V; \
  typedef typename F::I I; \
  static_assert(sizeof(V) == sizeof(I)); \
  static_assert(sizeof(T) <= sizeof(A))

// [1] transform
template <class F> INLINE Pair<typename F::V> transform(typename F::V x, const Options& o) {
  TYPES(F);
  if constexpr (!F::CHANGED) return {x, V{}};
  const double k = o.logit_scale, s = o.softcap;
  if (!(s > 0)) return product(x, k);
  return in_double(x, [&](Vec::f64 x_c) LAMBDA { return s * tanh<double>(x_c * (k / s)); });
}

// z - m.
template <class F> INLINE typename F::V minus(const Pair<typename F::V>& z, const Pair<typename F::V>& m) {
  if constexpr (F::CHANGED) return z.high - m.high + (z.low - m.low);
  else return z.high - m.high;
}

// What orders the classes of a row as z does, without a softcap's cost.
template <class F> INLINE typename F::V order(typename F::V x, const Options& o) {
  const double k = o.logit_scale;
  return F::CHANGED ? x * typename F::A(k > 0 ? 1 : k < 0 ? -1 : 0) : x;
}

// z of the largest in that order.
template <class F> INLINE double transform_ordered(typename F::A largest, const Options& o) {
  return transform<F>(order<F>(splat(largest), o), o).sum();
}

// [2] transform_grad
template <class F> INLINE typename F::V transform_grad(typename F::V x, const Options& o) {
  TYPES(F);
  const A k = A(o.logit_scale);
  if (!F::CHANGED || !(o.softcap > 0)) return splat(k);
  return k * sech2<A>(product(x, o.logit_scale / o.softcap));
}

// What a part of a row leaves: see contract.RowSums. `N` is double for one row, or a vector for a row in each lane.
template <class N> struct RowSums { N m, so, z_y, q_y, q_others, q_drop, e_drop, argmax; };

// The sums that take a part's classes one vector after another. so alternates between two, so that one addition need
// not wait for the other.
template <class F> struct LaneSums { typename F::V so[2] = {}, q_others = {}, q_drop = {}, e_drop = {}; };

// [3] row_lse
// e_c drop, and 0 where a class has no part in the sums and drop may be infinite.
template <class N> INLINE N times_drop(N e_c, N drop) { return e_c == 0 ? e_c : e_c * drop; }

// Adds classes: e_c = exp(z - m), and drop() = m - z where a sum asks for it. For y, and for lanes that hold no class,
// e_c, q_c and drop() are 0.
template <class F, class Drop>
INLINE void row_lse(LaneSums<F>& sums, typename F::V e_c, typename F::V q_c, Drop drop, int turn, bool wants_stats) {
  sums.so[turn] += e_c;
  if constexpr (F::DENSE) {
    sums.q_others += q_c;
    const typename F::V drop_c = drop();
    sums.q_drop += drop_c == 0 ? drop_c : q_c * drop_c;  // a weight may be infinite
  }
  if (wants_stats) sums.e_drop += times_drop(e_c, drop());
}

// m, or 0 where every class is -inf: (-inf) - (-inf) would be NaN.
template <class N> INLINE N finite(N m) { return m == -infinity_of(m) ? N{} : m; }

// The sums of a part as they are relative to the m of the whole row; of a part that holds m they are that already.
template <class N> INLINE RowSums<N> rescale(RowSums<N> part, N m) {
  if (part.m == m) return part;
  const N rise = finite(m) - finite(part.m), shrink = exp_of(part.m - finite(m));
  part.m = m;
  part.q_drop += part.q_others * rise;
  part.e_drop = (part.e_drop + part.so * rise) * shrink;
  part.so *= shrink;
  return part;
}

// y joins the other classes: where the row's y is another part's.
template <class N> INLINE RowSums<N> put_back(RowSums<N> sums) {
  const N y_drop = finite(sums.m) - sums.z_y;
  sums.so += exp_of(-y_drop);
  sums.q_others += sums.q_y;
  sums.q_drop += sums.q_y * y_drop;
  sums.e_drop += times_drop(exp_of(-y_drop), y_drop);
  sums.z_y = -infinity_of(sums.m);
  sums.q_y = N{};
  return sums;
}

// The sums of two parts of a row, the first before the second; `probs`: each left out a largest class of its own.
template <class N> INLINE RowSums<N> combine(RowSums<N> a, RowSums<N> b, bool probs) {
  const bool higher = b.m > a.m;
  const N m = higher ? b.m : a.m;
  if (probs) (higher ? a : b) = put_back(higher ? a : b);
  a = rescale(a, m), b = rescale(b, m);
  const bool takes_a = a.z_y > b.z_y || a.z_y != a.z_y;  // a NaN of y's wins
  return {m,
          a.so + b.so,
          takes_a ? a.z_y : b.z_y,
          a.q_y + b.q_y,
          a.q_others + b.q_others,
          a.q_drop + b.q_drop,
          a.e_drop + b.e_drop,
          higher ? b.argmax : a.argmax};
}

// What the loss and the gradient of a row are made from, once its sums are known; their m and z_y may be counted from
// `base`.
template <class N, class A> struct RowTerms {
  const RowSums<N>& sums;
  N e_y, lse_m, lse;  // exp(z_y - m), lse - m

  // `largest`: y is known for a class with the largest z, so that exp(0), or NaN, needs no exponential.
  INLINE explicit RowTerms(const RowSums<N>& sums, N base = N{}, bool largest = false) : sums(sums) {
    e_y = largest ? 1 + (sums.z_y - sums.m) : exp_of(sums.z_y - sums.m);
    lse_m = log1p_of(sums.so + (e_y - 1));
    lse = base + sums.m + lse_m;
  }
};

// [4] row_loss
template <class N, class A> INLINE N row_loss(const RowTerms<N, A>& row, const Call& call) {
  const RowSums<N>& sums = row.sums;
  const A L = A(call.options.lse_square_scale * call.ratio);
  N loss = sums.q_y * (row.lse_m + (sums.m - sums.z_y));
  if (call.probs || call.options.label_smoothing > 0) loss += sums.q_others * row.lse_m + sums.q_drop;
  if (L != 0) loss += L * row.lse * row.lse;
  return loss;
}

// Sum of p_c drop.
template <class N, class A> INLINE N mean_drop(const RowTerms<N, A>& row) {
  const RowSums<N>& sums = row.sums;
  return (sums.e_drop + times_drop(row.e_y, sums.m - sums.z_y)) / (sums.so + row.e_y);
}

// What a row's gradient needs: dz_c = (p_scale + h_scale drop) exp(z_c - m) - scale q_c, and dz_y on its own.
template <class N, class A> struct GradFactors {
  N p_scale, scale, dz_y, h_scale;

  INLINE GradFactors(const RowTerms<N, A>& row, const Call& call, N scale, N g_lse, bool of_entropy, N g_entropy)
      : scale(scale) {
    const RowSums<N>& sums = row.sums;
    const A L = A(call.options.lse_square_scale * call.ratio);
    const N inverse = 1 / (sums.so + row.e_y);
    N others = scale * sums.q_others + g_lse;
    if (L != 0) others += 2 * L * scale * row.lse;
    p_scale = (others + scale * sums.q_y) * inverse;
    dz_y = others * (row.e_y * inverse) - scale * sums.q_y * (sums.so * inverse);
    h_scale = N{};
    if (!of_entropy) return;
    h_scale = g_entropy * inverse;
    const N mean = mean_drop(row);
    p_scale -= h_scale * mean;
    dz_y += h_scale * (times_drop(row.e_y, sums.m - sums.z_y) - row.e_y * mean);
  }
  INLINE N largest() const { return __builtin_fabs(h_scale) > __builtin_fabs(p_scale) ? h_scale : p_scale; }
};

// [5] row_grad
// dx of classes other than y; slope() is dz/dx, asked for where it is not the same number everywhere, and drop() where
// the entropy has an upstream gradient.
template <class F, class P, class Drop, class Slope>
INLINE typename F::V row_grad(typename F::V e_c, typename F::V q_c, P p_scale, P scale, P h_scale, bool of_entropy,
                              Drop drop, bool capped, Slope slope) {
  typename F::V dx = p_scale * e_c;
  if (of_entropy) dx += h_scale * times_drop(e_c, drop());
  if constexpr (F::DENSE) dx -= scale * q_c;
  if (capped) dx *= slope();
  return dx;
}

// The gradient of a probability; `share` is the upstream gradient times 1 - e, `drop` m - z.
template <class N, class V, class P> INLINE V target_grad(V drop, N lse_m, P share) { return share * (lse_m + drop); }

template <class N, class A> INLINE N row_entropy(const RowTerms<N, A>& row) { return row.lse_m + mean_drop(row); }
INLINE Stats row_stats(double lse, double entropy, double L, int64_t argmax) {
  return {lse, L == 0 ? 0.0 : L * lse * lse, entropy, argmax};
}

// The share of q that a class index has of its own.
template <class A> A own_q(const Call& call, int64_t y) {
  const A* w = static_cast<const A*>(call.weight);
  return call.probs ? A(0) : A(1 - call.options.label_smoothing) * (w ? w[y] : A(1));
}

// The spread part of q for classes [begin, end) of a row: w_c ((1 - e) t_c + e / total), t = 0 under class indices.
template <class A> void spread_q(A* q, const Call& call, int64_t t_offset, int64_t begin, int64_t end) {
  const double e = call.options.label_smoothing;
  const A u = A(e / double(call.total)), share = A(1 - e);
  const A* w = static_cast<const A*>(call.weight);
  if (call.probs)
    read_elements(q, call.target.data, call.target.dtype, t_offset + begin * call.target.class_stride,
                  call.target.class_stride, end - begin);
  constexpr int lanes = Constants<A>::lanes;
  for (int64_t i = 0; i < end - begin; i += lanes) {
    const int64_t n = end - begin - i < lanes ? end - begin - i : lanes;
    const bool whole = n == lanes;
    auto q_c = splat(u);
    if (call.probs) q_c += share * (whole ? load(q + i) : load_first(q + i, n));
    if (w) q_c *= whole ? load(w + begin + i) : load_first(w + begin + i, n);
    if (whole) store(q + i, q_c);
    else store_first(q + i, q_c, n);
  }
}

// The sums of a row of contract.RowSums, in and out.
INLINE RowSums<double> load_sums(const Call& call, int64_t row) {
  const auto field = [&](int i) { return call.sums[i * call.rows + row]; };
  return {field(0), field(1), field(2), field(3), field(4), field(5), field(6), field(7)};
}
INLINE void store_sums(const Call& call, int64_t row, const RowSums<double>& sums) {
  const auto field = [&](int i) -> double& { return call.sums[i * call.rows + row]; };
  field(0) = sums.m, field(1) = sums.so, field(2) = sums.z_y, field(3) = sums.q_y;
  field(4) = sums.q_others, field(5) = sums.q_drop, field(6) = sums.e_drop, field(7) = sums.argmax;
}

void combine_numbers(double* sums, const double* after, bool probs) {
  RowSums<double> a, b;
  static_assert(sizeof a == 8 * sizeof(double));
  __builtin_memcpy(&a, sums, sizeof a);
  __builtin_memcpy(&b, after, sizeof b);
  a = combine(a, b, probs);
  __builtin_memcpy(sums, &a, sizeof a);
}
