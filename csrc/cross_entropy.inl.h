// The kernel: the five functions of reference.py, same names, same letters, same order, for one row of a call.
// What differs is the machine: the lanes of a vector are classes side by side, and a row is taken in blocks that stay
// in the L1 cache. `across.inl.h` holds the same for rows whose classes lie apart, or are few: its lanes are rows.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

constexpr int64_t BLOCK = 2048;  // classes

// What is settled at compile time: the element type, whether there is a softcap, whether q is more than one class.
template <class T_, bool CAP_, bool DENSE_> struct Form {
  typedef T_ T;
  typedef typename Simd<T>::A A;
  typedef typename Simd<T>::V V;
  typedef typename Simd<T>::I I;
  static constexpr bool CAP = CAP_, DENSE = DENSE_;
  static constexpr int lanes = Constants<A>::lanes;
};

#define TYPES(F) \
  typedef typename F::T T; \
  typedef typename F::A A; \
  typedef typename F::V V; \
  typedef typename F::I I; \
  static_assert(sizeof(V) == sizeof(I)); \
  static_assert(sizeof(T) <= sizeof(A))

#define LAMBDA __attribute__((always_inline))

// [1] transform
template <class F> INLINE typename F::V transform(typename F::V x, const Options& o) {
  TYPES(F);
  V z = x * A(o.logit_scale);
  if constexpr (F::CAP) z = A(o.softcap) * tanh<A, V, I>(z * A(1 / o.softcap));
  return z;
}

// [2] transform_grad
template <class F> INLINE typename F::V transform_grad(typename F::V x, const Options& o) {
  TYPES(F);
  if constexpr (!F::CAP) return splat(A(o.logit_scale));
  return A(o.logit_scale) * sech2<A, V, I>(x * A(o.logit_scale) * A(1 / o.softcap));
}

// f(begin, end) for the blocks of a row.
template <class Function> INLINE void blocks(int64_t C, Function f) {
  for (int64_t begin = 0; begin < C; begin += BLOCK) f(begin, begin + BLOCK < C ? begin + BLOCK : C);
}

// f(x, z, class, lanes in use) for the vectors of a block; z past the end holds `fill`, put there after the
// transform: a softcap would turn a padding of -inf into -s.
template <class F, class Function>
INLINE void each(const typename F::T* x, int64_t begin, int64_t end, const Options& o, typename F::A fill, Function f) {
  TYPES(F);
  int64_t c = begin;
  for (; c + F::lanes <= end; c += F::lanes) {
    const V x_c = load(x + c);
    f(x_c, transform<F>(x_c, o), c, F::lanes);
  }
  if (c < end) {
    const V x_c = load_first(x + c, end - c);
    f(x_c, keep_first<A>(transform<F>(x_c, o), end - c, fill), c, int(end - c));
  }
}

// The spread part of q for classes [begin, end) of a row: w_c ((1 - e) t_c + e / C), t = 0 under class indices.
template <class A> void spread_q(A* q, const Call& call, int64_t t_offset, int64_t begin, int64_t end) {
  const double e = call.options.label_smoothing;
  const A u = A(e / double(call.C)), share = A(1 - e);
  const A* w = static_cast<const A*>(call.weight);
  if (call.probs)
    read_elements(q, call.target.data, call.target.dtype, t_offset + begin * call.target.class_stride,
                  call.target.class_stride, end - begin);
  for (int64_t i = 0; i < end - begin; i++) {
    A q_c = call.probs ? share * q[i] + u : u;
    q[i] = w ? q_c * w[begin + i] : q_c;
  }
}

struct Sums {
  Stats stats;
  double below;  // sum of q_c (m - z_c), spread part
};

// The largest logit, which is left out of the sum when no target is named.
template <class F> int64_t largest(const typename F::T* x, int64_t C, const Options& o) {
  TYPES(F);
  A best = -__builtin_inff();
  int64_t y = 0;
  each<F>(x, 0, C, o, best, [&](V, V z, int64_t c, int n) LAMBDA {
    if (!(lane_max<A>(z) > best)) return;
    for (int i = 0; i < n; i++)
      if (z[i] > best) best = z[i], y = c + i;
  });
  return y;
}

// [3] row_lse
template <class F>
Sums row_lse(const typename F::T* x, int64_t y, const Call& call, int64_t t_offset) {
  TYPES(F);
  const A inf = A(__builtin_inff());
  const Options& o = call.options;
  const int64_t y_vector = y - y % F::lanes;
  A m = -inf, q[F::DENSE ? BLOCK : 1];
  double so = 0, rest = 0, below = 0, q_seen = 0;
  blocks(call.C, [&](int64_t begin, int64_t end) LAMBDA {
    V block_max = splat(-inf);
    each<F>(x, begin, end, o, -inf, [&](V, V z, int64_t, int) LAMBDA { block_max = max(z, block_max); });
    const A larger = lane_max<A>(block_max);
    if (larger > m) {
      so *= __builtin_exp(double(m) - double(larger));
      if (q_seen != 0) below += q_seen * (double(larger) - double(m));
      m = larger;
    }
    // While all classes so far are -inf, (-inf) - (-inf) would make NaN of a zero.
    const A shift = m == -inf ? A(0) : m;
    V sum = {}, sum_below = {}, sum_q = {};
    if constexpr (F::DENSE) spread_q(q, call, t_offset, begin, end);
    each<F>(x, begin, end, o, -inf, [&](V, V z, int64_t c, int n) LAMBDA {
      if constexpr (F::DENSE) {
        V q_c = n == F::lanes ? load(q + c - begin) : load_first(q + c - begin, n);
        sum_below += keep_first<A>(q_c * (shift - z), n, A(0));
        if (c == y_vector) q_seen += q_c[y - c], q_c[y - c] = 0;
        sum_q += q_c;
      }
      if (c == y_vector) z[y - c] = -inf;
      sum += exp<A, V, I>(z - shift);
    });
    so += lane_sum<A>(sum);
    if constexpr (F::DENSE) {
      const double block_rest = lane_sum<A>(sum_q);
      rest += block_rest;
      q_seen += block_rest;
      below += lane_sum<A>(sum_below);
    }
  });
  return {{double(m), so, rest, double(y)}, below};
}

// One row's scalars, in double: they are few, and the loss keeps every digit.
struct Row {
  double z_y, e_y, lse_m;  // lse_m = lse - m
  double q_own, q_y;       // the target's own share of q, and all of q_y

  template <class A> static Row at(double z_y, const Stats& stats, const Call& call, int64_t t_offset) {
    const A* w = static_cast<const A*>(call.weight);
    Row row;
    row.z_y = z_y;
    row.e_y = __builtin_exp(z_y - stats.m);
    row.lse_m = __builtin_log1p(stats.so + (row.e_y - 1));
    row.q_own = call.probs ? 0.0 : (1 - call.options.label_smoothing) * (w ? double(w[int64_t(stats.y)]) : 1.0);
    A q = 0;
    if (call.probs || call.options.label_smoothing > 0)
      spread_q(&q, call, t_offset, int64_t(stats.y), int64_t(stats.y) + 1);
    row.q_y = row.q_own + double(q);
    return row;
  }
};

// [4] row_loss
inline double row_loss(const Sums& sums, const Row& row, const Call& call) {
  const double L = call.options.lse_square_scale, m = sums.stats.m, lse = m + row.lse_m;
  double loss = 0;
  if (!call.probs) loss = row.q_own * (row.lse_m + (m - row.z_y));
  if (call.probs || call.options.label_smoothing > 0)
    loss += (sums.stats.rest + (row.q_y - row.q_own)) * row.lse_m + sums.below;
  return L == 0 ? loss : loss + L * lse * lse;
}

// What one row's gradient needs: dz_c = p * exp(z_c - m) - scale * q_c, and dz_y on its own.
struct Slope {
  double p, scale, dz_y;

  static Slope of(const Stats& stats, const Row& row, const Call& call, double scale, double g_lse) {
    const double L = call.options.lse_square_scale, s = stats.so + row.e_y;
    const double lse_part = (L == 0 ? 0.0 : 2 * L * scale * (stats.m + row.lse_m)) + g_lse;
    const double others = scale * stats.rest + lse_part;
    return {(others + scale * row.q_y) / s, scale, others * (row.e_y / s) - scale * row.q_y * (stats.so / s)};
  }
};

// [5] row_grad
template <class F>
void row_grad(typename F::T* dx, const typename F::T* x, const Stats& stats, const Slope& slope, const Call& call,
              int64_t t_offset) {
  TYPES(F);
  const Options& o = call.options;
  const A m = A(stats.m), p = A(slope.p), scale = A(slope.scale);
  // Before the loop: dx may be x itself.
  const V dx_y = A(slope.dz_y) * transform_grad<F>(load_first(x + int64_t(stats.y), 1), o);
  A q[F::DENSE ? BLOCK : 1];
  blocks(call.C, [&](int64_t begin, int64_t end) LAMBDA {
    if constexpr (F::DENSE) spread_q(q, call, t_offset, begin, end);
    each<F>(x, begin, end, o, A(0), [&](V x_c, V z, int64_t c, int n) LAMBDA {
      V dz = p * exp<A, V, I>(z - m);
      if constexpr (F::DENSE) dz -= scale * (n == F::lanes ? load(q + c - begin) : load_first(q + c - begin, n));
      const V result = dz * transform_grad<F>(x_c, o);
      if (n == F::lanes) store(dx + c, result);
      else store_first(dx + c, result, n);
    });
  });
  store_first(dx + int64_t(stats.y), dx_y, 1);
}

// d loss / d t_c = (1 - e) w_c (lse - z_c), for probabilities that ask for a gradient.
template <class F>
void target_grad(const typename F::T* x, const Stats& stats, const Row& row, const Call& call, int64_t offset,
                 double scale) {
  TYPES(F);
  const A* w = static_cast<const A*>(call.weight);
  const A share = A(scale * (1 - call.options.label_smoothing)), lse_m = A(row.lse_m), m = A(stats.m);
  A dt[BLOCK];
  blocks(call.C, [&](int64_t begin, int64_t end) LAMBDA {
    each<F>(x, begin, end, call.options, A(0), [&](V, V z, int64_t c, int n) LAMBDA {
      V result = share * (lse_m + (m - z));
      if (w) result *= n == F::lanes ? load(w + c) : load_first(w + c, n);
      store_first(dt + c - begin, result, n);
    });
    write_elements(call.d_target.data, call.d_target.dtype, offset + begin * call.d_target.class_stride,
                   call.d_target.class_stride, dt, end - begin);
  });
}

// The entropy of p: lse - sum of p_c z_c = lse_m + sum of p_c (m - z_c), and which logit is the largest.
template <class F>
Extras row_extras(const typename F::T* x, const Stats& stats, const Row& row, const Call& call) {
  TYPES(F);
  const A m = A(stats.m);
  double sum = 0;
  blocks(call.C, [&](int64_t begin, int64_t end) LAMBDA {
    V block_sum = {};
    each<F>(x, begin, end, call.options, -A(__builtin_inff()), [&](V, V z, int64_t, int) LAMBDA {
      const V e_c = exp<A, V, I>(z - m);
      block_sum += e_c == 0 ? e_c : e_c * (m - z);
    });
    sum += lane_sum<A>(block_sum);
  });
  const double lse = stats.m + row.lse_m, L = call.options.lse_square_scale;
  return {lse, L == 0 ? 0.0 : L * lse * lse, row.lse_m + sum / (stats.so + row.e_y),
          largest<F>(x, call.C, call.options)};
}

template <class A> void write_row(const Call& call, int64_t row, double loss, const Stats& stats) {
  static_cast<A*>(call.loss)[row] = A(loss);
  if (call.stats) call.stats[row] = stats;
}

// Loss and gradient 0 whatever the logits hold: they are not even read.
template <class A> void write_ignored(const Call& call, int64_t row) {
  if (call.loss) write_row<A>(call, row, 0, Stats{0, 0, 0, -1});
  if (call.extras) call.extras[row] = Extras{0, 0, 0, -1};
}

template <class F> void along_rows(const Call& call, int64_t begin, int64_t end) {
  TYPES(F);
  const A *upstream = static_cast<const A*>(call.upstream), *g_lse = static_cast<const A*>(call.g_lse);
  for (int64_t i = begin; i < end; i++) {
    const T* x = static_cast<const T*>(call.input.data) + call.dims.offset(call.input, i);
    T* dx = call.grad.data ? static_cast<T*>(call.grad.data) + call.dims.offset(call.grad, i) : nullptr;
    const int64_t t_offset = call.probs ? call.dims.offset(call.target, i) : 0;
    const int64_t y = call.probs ? -1 : call.target_index(i);
    if (!call.probs && y == call.options.ignore_index) {
      write_ignored<A>(call, i);
      if (dx) __builtin_memset(dx, 0, call.C * sizeof(T));
      continue;
    }
    const Sums sums = call.loss ? row_lse<F>(x, call.probs ? largest<F>(x, call.C, call.options) : y, call, t_offset)
                                : Sums{call.stats[i], 0};
    const Stats& stats = sums.stats;
    const Row row =
        Row::at<A>(transform<F>(load_first(x + int64_t(stats.y), 1), call.options)[0], stats, call, t_offset);
    if (call.loss) write_row<A>(call, i, row_loss(sums, row, call), stats);
    if (call.extras) call.extras[i] = row_extras<F>(x, stats, row, call);
    const double scale = call.scale * (upstream ? double(upstream[i]) : 1.0);
    const Slope slope = Slope::of(stats, row, call, scale, g_lse ? double(g_lse[i]) : 0.0);
    if (dx) row_grad<F>(dx, x, stats, slope, call, t_offset);
    if (call.d_target.data) target_grad<F>(x, stats, row, call, call.dims.offset(call.d_target, i), scale);
  }
}
