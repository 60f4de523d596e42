// The kernel: the five functions of reference.py, same names, same letters, same order, for one row of a call.
// What differs is the machine: the lanes of a vector are classes side by side, and a row is taken in blocks that stay
// in the L1 cache. `across.inl.h` holds the same for rows whose classes lie apart, or are few: its lanes are rows.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

constexpr int64_t BLOCK = 2048;  // classes

// Vectors summed in acc before they join a total that keeps what is rounded off: a long run of equal terms would be
// rounded the same way every time.
constexpr int64_t RUN = 8;

// What is settled at compile time: the element type, whether there is a softcap, whether q is more than one class.
template <class T_, bool CAP_, bool DENSE_> struct Form {
  typedef T_ T;
  typedef typename Simd<T>::A A;
  typedef typename Simd<T>::V V;
  typedef typename Simd<T>::I I;
  static constexpr bool CAP = CAP_, DENSE = DENSE_;
  static constexpr int lanes = Constants<A>::lanes;
  // 16-bit logits mostly differ by numbers that float holds, and over many classes the rest averages out.
  static constexpr bool EXACT = sizeof(T) == sizeof(float);
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

// The largest logit, which is left out of the sum when no target is named; a NaN counts as largest, as in torch.
template <class F> int64_t largest(const typename F::T* x, int64_t C, const Options& o) {
  TYPES(F);
  A best = -A(__builtin_inff());
  int64_t y = 0;
  each<F>(x, 0, C, o, best, [&](V, V z, int64_t c, int n) LAMBDA {
    const I above = (z > best) | (z != z);
    bool some = false;
    for (int i = 0; i < F::lanes; i++) some |= above[i] != 0;
    if (!some || best != best) return;
    for (int i = 0; i < n; i++)
      if (z[i] > best || (z[i] != z[i] && best == best)) best = z[i], y = c + i;
  });
  return y;
}

// exp(z_c - m) of a row, kept by row_lse for row_grad: one exponential a class instead of two. m is not known until
// the row's end, so each block's are relative to the largest z up to there.
template <class A> struct Kept {
  A* e;      // (C)
  A* shift;  // (number of blocks)
};

// [3] row_lse
template <class F, bool KEEP>
Sums row_lse(const typename F::T* x, int64_t y, const Call& call, int64_t t_offset, Kept<typename F::A> kept) {
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
    V total = {}, lost = {}, sum_below = {}, sum_q = {};
    if constexpr (F::DENSE) spread_q(q, call, t_offset, begin, end);
    for (int64_t run = begin; run < end; run += RUN * F::lanes) {
      V sum = {};
      const int64_t run_end = run + RUN * F::lanes < end ? run + RUN * F::lanes : end;
      each<F>(x, run, run_end, o, -inf, [&](V, V z, int64_t c, int n) LAMBDA {
        __builtin_prefetch(x + c + BLOCK);  // the next block travels while this one is worked on
        if constexpr (F::DENSE) {
          V q_c = n == F::lanes ? load(q + c - begin) : load_first(q + c - begin, n);
          sum_below += keep_first<A>(q_c * (shift - z), n, A(0));
          if (c == y_vector) q_seen += q_c[y - c], q_c[y - c] = 0;
          sum_q += q_c;
        }
        if (c == y_vector) z[y - c] = -inf;
        const V e_c = exp_minus<A, F::EXACT>(z, splat(shift));
        sum += e_c;
        if constexpr (KEEP) {
          if (n == F::lanes) store(kept.e + c, e_c);
          else store_first(kept.e + c, e_c, n);
        }
      });
      add(total, lost, sum);
    }
    if constexpr (KEEP) kept.shift[begin / BLOCK] = m;  // -inf: all of the block's exponentials are 0
    so += lane_sum<A>(total) + lane_sum<A>(lost);
    if constexpr (F::DENSE) {
      const double block_rest = lane_sum<A>(sum_q);
      rest += block_rest;
      q_seen += block_rest;
      below += lane_sum<A>(sum_below);
    }
  });
  return {{double(m), so, rest, double(y)}, below};
}

// What is known of a row once its sums are: S is double for one row (the scalars are few, and the loss keeps every
// digit), or a vector for a row in each lane. A is what S is made of.
template <class S, class A> struct Row {
  S m, so, rest, below;  // see Stats and Sums
  S z_y, q_own, q_y;     // class y: its z, the target's own share of q, and all of q
  S e_y, lse_m;          // exp(z_y - m), lse - m

  Row(S m, S so, S rest, S below, S z_y, S q_own, S q_y)
      : m(m), so(so), rest(rest), below(below), z_y(z_y), q_own(q_own), q_y(q_y) {
    e_y = exp_of(z_y - m);
    lse_m = log1p_of(so + (e_y - 1));
  }
};

// [4] row_loss
template <class S, class A> S row_loss(const Row<S, A>& r, const Call& call) {
  const A L = A(call.L);
  S loss = S{};
  if (!call.probs) loss = r.q_own * (r.lse_m + (r.m - r.z_y));
  if (call.probs || call.options.label_smoothing > 0) loss += (r.rest + (r.q_y - r.q_own)) * r.lse_m + r.below;
  if (L != 0) loss += L * (r.m + r.lse_m) * (r.m + r.lse_m);
  return loss;
}

// What a row's gradient needs: dz_c = p * exp(z_c - m) - scale * q_c, and dz_y on its own.
template <class S, class A> struct Slope {
  S p, scale, dz_y;

  Slope(const Row<S, A>& r, const Call& call, S scale, S g_lse) : scale(scale) {
    const A L = A(call.L);
    const S s_inverse = 1 / (r.so + r.e_y);
    S others = scale * r.rest + g_lse;
    if (L != 0) others += 2 * L * scale * (r.m + r.lse_m);
    p = (others + scale * r.q_y) * s_inverse;
    dz_y = others * (r.e_y * s_inverse) - scale * r.q_y * (r.so * s_inverse);
  }
};

// The share of q that a class index has of its own, and the spread part of q at class y.
template <class A> A own_q(const Call& call, int64_t y) {
  const A* w = static_cast<const A*>(call.weight);
  return call.probs ? A(0) : A(1 - call.options.label_smoothing) * (w ? w[y] : A(1));
}
template <class A> A spread_q_at(const Call& call, int64_t t_offset, int64_t y) {
  A q = 0;
  if (call.probs || call.options.label_smoothing > 0) spread_q(&q, call, t_offset, y, y + 1);
  return q;
}

// [5] row_grad
template <class F, bool KEEP>
void row_grad(typename F::T* dx, const typename F::T* x, const Stats& stats, typename F::V x_y,
              const Slope<double, double>& slope, const Call& call, int64_t t_offset, Kept<typename F::A> kept) {
  TYPES(F);
  const Options& o = call.options;
  const A m = A(stats.m), scale = A(slope.scale);
  A q[F::DENSE ? BLOCK : 1];
  blocks(call.C, [&](int64_t begin, int64_t end) LAMBDA {
    if constexpr (F::DENSE) spread_q(q, call, t_offset, begin, end);
    const A p = A(KEEP ? slope.p * __builtin_exp(double(kept.shift[begin / BLOCK]) - stats.m) : slope.p);
    each<F>(x, begin, end, o, A(0), [&](V x_c, V z, int64_t c, int n) LAMBDA {
      const bool whole = n == F::lanes;
      V dz;
      if constexpr (KEEP) dz = p * (whole ? load(kept.e + c) : load_first(kept.e + c, n));
      else dz = p * exp_minus<A, F::EXACT>(z, splat(m));
      if constexpr (F::DENSE) dz -= scale * (whole ? load(q + c - begin) : load_first(q + c - begin, n));
      const V result = dz * transform_grad<F>(x_c, o);
      if (whole) store(dx + c, result);
      else store_first(dx + c, result, n);
    });
  });
  store_first(dx + int64_t(stats.y), A(slope.dz_y) * transform_grad<F>(x_y, o), 1);
}

// d loss / d t_c = (1 - e) w_c (lse - z_c), for probabilities that ask for a gradient.
template <class F>
void target_grad(const typename F::T* x, const Stats& stats, const Row<double, double>& row, const Call& call,
                 int64_t offset, double scale) {
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
Extras row_extras(const typename F::T* x, const Stats& stats, const Row<double, double>& row, const Call& call) {
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

template <class F> void along_rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  TYPES(F);
  const A *upstream = static_cast<const A*>(call.upstream), *g_lse = static_cast<const A*>(call.g_lse);
  A* const shift = static_cast<A*>(scratch);
  for (int64_t i = begin; i < end; i++) {
    const T* x = static_cast<const T*>(call.input.data) + call.dims.offset(call.input, i);
    T* dx = call.grad.data ? static_cast<T*>(call.grad.data) + call.dims.offset(call.grad, i) : nullptr;
    const int64_t t_offset = call.probs ? call.dims.offset(call.target, i) : 0;
    int64_t y = call.probs ? 0 : call.target_index(i);
    if (!call.probs && y == call.options.ignore_index) {
      write_ignored<A>(call, i);
      if (dx) __builtin_memset(dx, 0, call.C * sizeof(T));
      continue;
    }
    if (call.probs) y = call.loss ? largest<F>(x, call.C, call.options) : int64_t(call.stats[i].y);
    const V x_y = load_first(x + y, 1);  // before dx, which may be x, is written
    const bool keep = call.loss && dx;
    // Where dx has room for acc and x is not needed again, the exponentials wait in it for their factor.
    const bool in_dx = sizeof(T) == sizeof(A) && !F::CAP && !call.extras;
    const Kept<A> kept = {in_dx ? reinterpret_cast<A*>(dx) : shift + (call.C + BLOCK - 1) / BLOCK, shift};
    const Sums sums = !call.loss ? Sums{call.stats[i], 0}
                      : keep     ? row_lse<F, true>(x, y, call, t_offset, kept)
                                 : row_lse<F, false>(x, y, call, t_offset, kept);
    const Stats& stats = sums.stats;
    const double own = own_q<A>(call, y), spread = spread_q_at<A>(call, t_offset, y);
    const double z_y = transform<F>(x_y, call.options)[0];
    const Row<double, double> row(stats.m, stats.so, stats.rest, sums.below, z_y, own, own + spread);
    if (call.loss) write_row<A>(call, i, row_loss(row, call), stats);
    if (call.extras) call.extras[i] = row_extras<F>(x, stats, row, call);
    const double scale = call.scale * (upstream ? double(upstream[i]) : 1.0);
    const Slope<double, double> slope(row, call, scale, g_lse ? double(g_lse[i]) : 0.0);
    if (call.d_target.data) target_grad<F>(x, stats, row, call, call.dims.offset(call.d_target, i), scale);
    if (!dx) continue;
    if (keep) row_grad<F, true>(dx, x, stats, x_y, slope, call, t_offset, kept);
    else row_grad<F, false>(dx, x, stats, x_y, slope, call, t_offset, kept);
  }
}
