// The kernel: the five functions of reference.py, same names, same letters, same order, for one row of a call.
// What differs is the machine: the lanes of a vector are classes side by side, and a row is taken in blocks that stay
// in the L1 cache. `across.inl.h` holds the same for rows whose classes lie apart, or are few: its lanes are rows.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

constexpr int64_t BLOCK = 2048;  // classes

// Vectors summed in acc before they join a total that keeps what is rounded off: a long run of equal terms would be
// rounded the same way every time.
constexpr int64_t RUN = 8;

// What is settled at compile time: the element type, whether z is more than x (CHANGED: a scale or a softcap), whether
// q is more than one class.
template <class T_, bool CHANGED_, bool DENSE_> struct Form {
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

#define LAMBDA __attribute__((always_inline))

// [1] transform
template <class F> INLINE typename F::V transform(typename F::V x, const Options& o) {
  TYPES(F);
  if constexpr (!F::CHANGED) return x;
  const V z = x * A(o.logit_scale);
  return o.softcap > 0 ? A(o.softcap) * tanh<A>(z * A(1 / o.softcap)) : z;
}

// [2] transform_grad
template <class F> INLINE typename F::V transform_grad(typename F::V x, const Options& o) {
  TYPES(F);
  const V k = splat(A(o.logit_scale));
  return F::CHANGED && o.softcap > 0 ? k * sech2<A>(x * k * A(1 / o.softcap)) : k;
}

// f(x, z, class, lanes in use, 0 or 1 in turns) for the vectors of a block; z past the end holds `fill`, put there
// after the transform: a softcap would turn a padding of -inf into -s. In turns: two sums wait half as long for each
// other.
template <class F, class Function>
INLINE void each(const typename F::T* x, int64_t begin, int64_t end, const Options& o, typename F::A fill, Function f) {
  TYPES(F);
  const auto whole = [&](int64_t c, int turn) LAMBDA {
    const V x_c = load(x + c);
    f(x_c, transform<F>(x_c, o), c, F::lanes, turn);
  };
  int64_t c = begin;
  for (; c + 2 * F::lanes <= end; c += 2 * F::lanes) whole(c, 0), whole(c + F::lanes, 1);
  if (c + F::lanes <= end) whole(c, 0), c += F::lanes;
  if (c < end) {
    const V x_c = load_first(x + c, end - c);
    f(x_c, keep_first<A>(transform<F>(x_c, o), end - c, fill), c, int(end - c), 1);
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
  constexpr int L = Constants<A>::lanes;
  for (int64_t i = 0; i < end - begin; i += L) {
    const int64_t n = end - begin - i < L ? end - begin - i : L;
    const bool whole = n == L;
    auto q_c = splat(u);
    if (call.probs) q_c += share * (whole ? load(q + i) : load_first(q + i, n));
    if (w) q_c *= whole ? load(w + begin + i) : load_first(w + begin + i, n);
    if (whole) store(q + i, q_c);
    else store_first(q + i, q_c, n);
  }
}

// The largest logit, which is left out of the sum when no target is named; a NaN counts as largest, as in torch.
template <class F> int64_t largest(const typename F::T* x, int64_t C, const Options& options) {
  TYPES(F);
  const Options o = options;
  const V minus_inf = splat(-A(__builtin_inff()));
  A best = minus_inf[0];
  int64_t from = 0, y = -1;
  for (int64_t begin = 0; begin < C && best == best; begin += BLOCK) {
    V most[2] = {minus_inf, minus_inf}, nan = {};  // nan: 0, or a NaN
    each<F>(x, begin, begin + BLOCK < C ? begin + BLOCK : C, o, minus_inf[0],
            [&](V, V z, int64_t, int, int turn) LAMBDA {
              most[turn] = max(z, most[turn]);
              nan = z == z ? nan : z;
            });
    const A m = lane_max<A>(max(most[0], most[1])), sum = A(lane_sum(nan, V{}));
    if (m > best || sum != sum) best = sum != sum ? sum : m, from = begin;
  }
  each<F>(x, from, from + BLOCK < C ? from + BLOCK : C, o, A(0), [&](V, V z, int64_t c, int n, int) LAMBDA {
    const V hit = (best == best ? z == best : z != z) ? splat(A(1)) : V{};
    if (y >= 0 || lane_max<A>(hit) == 0) return;
    for (int i = n - 1; i >= 0; i--) y = hit[i] != 0 ? c + i : y;
  });
  return y;
}

// What one block gives to its row's sums, relative to a shift of its own: no block waits for another, and a row's bits
// are the same however many threads share it.
template <class A> struct Part {
  A m, above;          // the block's largest z, and what `below` and `heat` are measured from: m, or 0 if that is -inf
  double shift;        // so is a sum of exp(z - shift)
  double so, rest, q;  // see Stats; q: all of the spread part
  double below, heat;  // sums of q_c (above - z_c) and of exp(z_c - shift) (above - z_c)
};

// [3] row_lse
template <class F, bool KEEP>
Part<typename F::A> row_lse(typename F::A* kept, const typename F::T* x, int64_t y, const Call& call, int64_t t_offset,
                            int64_t begin, int64_t end) {
  TYPES(F);
  const A inf = A(__builtin_inff());
  const Options o = call.options;
  const bool wants_heat = call.extras;
  V most[2] = {splat(-inf), splat(-inf)};
  each<F>(x, begin, end, o, -inf, [&](V, V z, int64_t, int, int turn) LAMBDA { most[turn] = max(z, most[turn]); });
  const A m = lane_max<A>(max(most[0], most[1]));
  // Where all classes are -inf, (-inf) - (-inf) would make NaN of a zero.
  const A above = m == -inf ? A(0) : m;
  const Shifted<A> shifted(above);
  V total[4] = {}, lost[4] = {};  // of exp, q, below, heat
  A q[F::DENSE ? BLOCK : 1];
  double q_y = 0;
  if constexpr (F::DENSE) spread_q(q, call, t_offset, begin, end);
  for (int64_t run = begin; run < end; run += 2 * RUN * F::lanes) {
    V sum[2] = {}, sum_q = {}, sum_below = {}, heat = {};
    const int64_t run_end = run + 2 * RUN * F::lanes < end ? run + 2 * RUN * F::lanes : end;
    each<F>(x, run, run_end, o, -inf, [&](V, V z, int64_t c, int n, int turn) LAMBDA {
      __builtin_prefetch(x + c + BLOCK);  // the next block travels while this one is worked on
      const bool holds_y = c <= y && y < c + n;
      if constexpr (F::DENSE) {
        V q_c = n == F::lanes ? load(q + c - begin) : load_first(q + c - begin, n);
        sum_below += keep_first<A>(q_c * (above - z), n, A(0));
        if (holds_y) q_y = q[y - begin], q_c = lane_is<I>(y - c) ? V{} : q_c;
        sum_q += q_c;
      }
      if (holds_y) z = lane_is<I>(y - c) ? splat(-inf) : z;
      const V e_c = shifted.exp(z);
      sum[turn] += e_c;
      if (wants_heat) heat += e_c == 0 ? e_c : e_c * (above - z);
      if constexpr (KEEP) {
        if (n == F::lanes) store(kept + c, e_c);
        else store_first(kept + c, e_c, n);
      }
    });
    add(total[0], lost[0], sum[0] + sum[1]);
    if constexpr (F::DENSE) add(total[1], lost[1], sum_q), add(total[2], lost[2], sum_below);
    if (wants_heat) add(total[3], lost[3], heat);
  }
  const double rest = lane_sum(total[1], lost[1]);
  return {m,    above,      m == -inf ? double(m) : shifted.shift, lane_sum(total[0], lost[0]),
          rest, rest + q_y, lane_sum(total[2], lost[2]),           lane_sum(total[3], lost[3])};
}

// A whole row's sums, relative to its largest z.
template <class A> struct Sums {
  double m, so = 0, rest = 0, below = 0, heat = 0;

  INLINE Sums(const Part<A>* parts, int64_t n) : m(parts[0].m) {
    for (int64_t b = 1; b < n; b++) m = parts[b].m > m ? double(parts[b].m) : m;
    for (int64_t b = 0; b < n; b++) {
      const Part<A>& part = parts[b];
      const double factor = __builtin_exp(part.shift - m), rise = m - double(part.above);
      so += part.so * factor;
      rest += part.rest;
      below += part.below;
      if (part.q != 0) below += part.q * rise;
      if (part.so != 0) heat += (part.heat + part.so * rise) * factor;
    }
  }
  INLINE explicit Sums(const Stats& stats) : m(stats.m), so(stats.so), rest(stats.rest) {}
};

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
void row_grad(typename F::T* dx, const typename F::A* kept, double shift, const typename F::T* x, int64_t y,
              typename F::V x_y, const Sums<typename F::A>& sums, const Slope<double, double>& slope, const Call& call,
              int64_t t_offset, int64_t begin, int64_t end) {
  TYPES(F);
  const Options o = call.options;
  const Shifted<A> shifted{A(sums.m)};
  // Without a softcap dz/dx is the same number everywhere.
  const bool capped = F::CHANGED && o.softcap > 0;
  const double k = capped ? 1 : o.logit_scale;
  const A p = A(k * slope.p * __builtin_exp((KEEP ? shift : shifted.shift) - sums.m)), scale = A(k * slope.scale);
  A q[F::DENSE ? BLOCK : 1];
  if constexpr (F::DENSE) spread_q(q, call, t_offset, begin, end);
  each<F>(x, begin, end, o, A(0), [&](V x_c, V z, int64_t c, int n, int) LAMBDA {
    const bool whole = n == F::lanes;
    V dx_c;
    if constexpr (KEEP) dx_c = p * (whole ? load(kept + c) : load_first(kept + c, n));
    else dx_c = p * shifted.exp(z);
    if constexpr (F::DENSE) dx_c -= scale * (whole ? load(q + c - begin) : load_first(q + c - begin, n));
    if (capped) dx_c *= transform_grad<F>(x_c, o);
    if (whole) store(dx + c, dx_c);
    else store_first(dx + c, dx_c, n);
  });
  if (begin <= y && y < end) store_first(dx + y, A(slope.dz_y) * transform_grad<F>(x_y, o), 1);
}

// d loss / d t_c = (1 - e) w_c (lse - z_c), for probabilities that ask for a gradient.
template <class F>
void target_grad(const typename F::T* x, double m, double lse_m, const Call& call, int64_t offset, double scale,
                 int64_t begin, int64_t end) {
  TYPES(F);
  const A* w = static_cast<const A*>(call.weight);
  const A share = A(scale * (1 - call.options.label_smoothing));
  A dt[BLOCK];
  each<F>(x, begin, end, call.options, A(0), [&](V, V z, int64_t c, int n, int) LAMBDA {
    V result = share * (A(lse_m) + (A(m) - z));
    if (w) result *= n == F::lanes ? load(w + c) : load_first(w + c, n);
    store_first(dt + c - begin, result, n);
  });
  write_elements(call.d_target.data, call.d_target.dtype, offset + begin * call.d_target.class_stride,
                 call.d_target.class_stride, dt, end - begin);
}

// The entropy of p is lse - sum of p_c z_c = lse_m + sum of p_c (m - z_c).
template <class A>
Extras row_extras(const Sums<A>& sums, const Row<double, double>& row, double L, int64_t argmax) {
  const double lse = sums.m + row.lse_m, heat = sums.heat + (row.e_y == 0 ? 0 : row.e_y * (sums.m - row.z_y));
  return {lse, L == 0 ? 0.0 : L * lse * lse, row.lse_m + heat / (sums.so + row.e_y), argmax};
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

// Each row by the whole team: its members take blocks, and wait for each other where one reads what another wrote.
template <class F> void along_rows(const Call& call, int64_t begin, int64_t end, void* scratch, const Team& team) {
  TYPES(F);
  const A *upstream = static_cast<const A*>(call.upstream), *g_lse = static_cast<const A*>(call.g_lse);
  const int64_t C = call.C, count = (C + BLOCK - 1) / BLOCK;
  A* const spare = static_cast<A*>(scratch);
  Part<A>* const parts = reinterpret_cast<Part<A>*>(spare + (C + F::lanes - 1) / F::lanes * F::lanes);
  const bool first = team.rank == 0;
  const auto my_blocks = [&](auto work) LAMBDA {
    for (int64_t b = count * team.rank / team.size; b < count * (team.rank + 1) / team.size; b++)
      work(b, b * BLOCK, b * BLOCK + BLOCK < C ? b * BLOCK + BLOCK : C);
  };
  for (int64_t i = begin; i < end; i++) {
    const T* x = static_cast<const T*>(call.input.data) + call.dims.offset(call.input, i);
    T* dx = call.grad.data ? static_cast<T*>(call.grad.data) + call.dims.offset(call.grad, i) : nullptr;
    const int64_t t_offset = call.probs ? call.dims.offset(call.target, i) : 0;
    int64_t y = call.probs ? 0 : call.target_at(call.dims.offset(call.target, i));
    if (!call.probs && y == call.options.ignore_index) {
      if (first) write_ignored<A>(call, i);
      if (first && dx) __builtin_memset(dx, 0, C * sizeof(T));
      continue;
    }
    const int64_t top = call.loss && (call.probs || (call.extras && first)) ? largest<F>(x, C, call.options) : 0;
    if (call.probs) y = call.loss ? top : int64_t(call.stats[i].y);
    const V x_y = load_first(x + y, 1);  // before anyone writes dx, which may be x
    // Where dx has room for acc and x is not needed again, the exponentials wait in it for their factor.
    const bool in_dx = sizeof(T) == sizeof(A) && !(F::CHANGED && call.options.softcap > 0);
    const bool keep = call.loss && dx;
    A* const kept = in_dx ? reinterpret_cast<A*>(dx) : spare;
    team.wait();
    if (call.loss)
      my_blocks([&](int64_t b, int64_t from, int64_t to) LAMBDA {
        parts[b] = keep ? row_lse<F, true>(kept, x, y, call, t_offset, from, to)
                        : row_lse<F, false>(nullptr, x, y, call, t_offset, from, to);
      });
    team.wait();
    const Sums<A> sums = call.loss ? Sums<A>(parts, count) : Sums<A>(call.stats[i]);
    const double own = own_q<A>(call, y), spread = spread_q_at<A>(call, t_offset, y);
    const double z_y = transform<F>(x_y, call.options)[0];
    const Row<double, double> row(sums.m, sums.so, sums.rest, sums.below, z_y, own, own + spread);
    if (call.loss && first) write_row<A>(call, i, row_loss(row, call), Stats{sums.m, sums.so, sums.rest, double(y)});
    if (call.extras && first) call.extras[i] = row_extras(sums, row, call.options.lse_square_scale, top);
    const double scale = call.scale * (upstream ? double(upstream[i]) : 1.0);
    const Slope<double, double> slope(row, call, scale, g_lse ? double(g_lse[i]) : 0.0);
    const int64_t dt_offset = call.d_target.data ? call.dims.offset(call.d_target, i) : 0;
    my_blocks([&](int64_t b, int64_t from, int64_t to) LAMBDA {
      if (call.d_target.data) target_grad<F>(x, sums.m, row.lse_m, call, dt_offset, scale, from, to);
      if (!dx) return;
      if (keep) row_grad<F, true>(dx, kept, parts[b].shift, x, y, x_y, sums, slope, call, t_offset, from, to);
      else row_grad<F, false>(dx, nullptr, 0, x, y, x_y, sums, slope, call, t_offset, from, to);
    });
    team.wait();
  }
}
