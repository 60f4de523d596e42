// The five functions again where the classes of a row lie apart (N, C, d1..dk; transposed logits) or are too few to
// fill a vector: the lanes are rows side by side, and a bundle of rows is first brought into scratch, read once.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

// One tensor's elements for class c, a row to each lane.
template <class F> struct Lanes {
  TYPES(F);
  T* p[F::lanes] = {};
  int64_t stride;
  int n;
  bool side_by_side;

  INLINE Lanes(const Call& call, const View& view, int64_t first, int n) : stride(view.class_stride), n(n) {
    side_by_side = n == F::lanes;
    for (int i = 0; i < n; i++) {
      p[i] = static_cast<T*>(view.data) + call.dims.offset(view, first + i);
      side_by_side &= p[i] == p[0] + i;
    }
  }
  // Rows that are not side by side go through `raw`, (C, lanes): element by element, and as vectors only when all of
  // it is there, because a vector read right behind the narrow writes that make it up would wait for them.
  INLINE void gather(T* raw, int64_t C) const {
    if (side_by_side) return;
    for (int i = 0; i < n; i++)
#pragma GCC unroll 8
      for (int64_t c = 0; c < C; c++) raw[c * F::lanes + i] = p[i][c * stride];
    for (int i = n; i < F::lanes; i++)
      for (int64_t c = 0; c < C; c++) raw[c * F::lanes + i] = T{};
  }
  INLINE V get(const T* raw, int64_t c) const { return load(side_by_side ? p[0] + c * stride : raw + c * F::lanes); }
  INLINE void put(T* raw, int64_t c, V v) const { store(side_by_side ? p[0] + c * stride : raw + c * F::lanes, v); }
  INLINE void scatter(const T* raw, int64_t C) const {
    if (side_by_side) return;
    for (int i = 0; i < n; i++)
#pragma GCC unroll 8
      for (int64_t c = 0; c < C; c++) p[i][c * stride] = raw[c * F::lanes + i];
  }
};

template <class F> struct Bundle {
  TYPES(F);
  typedef decltype(I{}[0] + 0) Index;
  static constexpr bool EXACT = sizeof(A) == sizeof(float);
  const Call& call;
  const int64_t first, C;                    // the row of lane 0
  const int n;                               // rows in use
  V* const z;                                // (C) transformed logits
  V* const slope;                            // (C) dz/dx
  V* const q;                                // (C) spread part of q, if DENSE
  V m = {}, so = {}, rest = {}, below = {};  // as in Sums
  I y = {}, argmax = {}, counts = {};        // counts: all bits set in rows that are not ignored

  Bundle(const Call& call, int64_t first, int n, void* scratch)
      : call(call), first(first), C(call.C), n(n), z(static_cast<V*>(scratch)), slope(z + C), q(slope + C) {
    bool some_ignored = false;
    for (int i = 0; i < n; i++) {
      const int64_t label = call.probs ? 0 : call.target_index(first + i);
      const bool ignored = !call.probs && label == call.options.ignore_index;
      y[i] = ignored ? 0 : Index(label);
      counts[i] = ignored ? 0 : -1;
      some_ignored |= ignored;
    }
    const Lanes<F> x(call, call.input, first, n);
    T* const raw = reinterpret_cast<T*>(q);  // q is not there yet
    x.gather(raw, C);
    for (int64_t c = 0; c < C; c++) {
      V x_c = x.get(raw, c);
      if (some_ignored) x_c = counts ? x_c : V{};  // it may be NaN
      z[c] = transform<F>(x_c, call.options);
      if (F::CAP && call.grad.data) slope[c] = transform_grad<F>(x_c, call.options);
    }
    if constexpr (F::DENSE) load_q();
  }

  void load_q() {
    A block[BLOCK];
    for (int i = 0; i < (call.probs ? n : 1); i++) {
      const int64_t offset = call.probs ? call.dims.offset(call.target, first + i) : 0;
      blocks(C, [&](int64_t begin, int64_t end) LAMBDA {
        spread_q(block, call, offset, begin, end);
        for (int64_t c = begin; c < end; c++)
          if (call.probs) q[c][i] = block[c - begin];
          else q[c] = splat(block[c - begin]);
      });
    }
  }

  // [3] row_lse
  void row_lse() {
    m = z[0];
    for (int64_t c = 1; c < C; c++) {
      const auto larger = (z[c] > m) | ((z[c] != z[c]) & (m == m));  // a NaN counts as largest, as in torch
      m = larger ? z[c] : m;
      argmax = larger ? I{} + Index(c) : argmax;
    }
    if (call.probs) y = argmax;
    V lost = {}, lost_q = {}, lost_below = {};
    for (int64_t begin = 0; begin < C; begin += RUN) {
      const int64_t end = begin + RUN < C ? begin + RUN : C;
      V sum = {}, sum_below = {}, sum_q = {};
      for (int64_t c = begin; c < end; c++) {
        const auto is_y = y == Index(c);
        sum += is_y ? V{} : exp_minus<A, EXACT>(z[c], m);
        if constexpr (F::DENSE) {
          sum_q += is_y ? V{} : q[c];
          sum_below += q[c] * (m - z[c]);
        }
      }
      add(so, lost, sum);
      if constexpr (F::DENSE) add(rest, lost_q, sum_q), add(below, lost_below, sum_below);
    }
    so += lost;
  }

  INLINE void read_stats() {
    for (int i = 0; i < n; i++) {
      const Stats& stats = call.stats[first + i];
      m[i] = A(stats.m), so[i] = A(stats.so), rest[i] = A(stats.rest);
      if (call.probs) y[i] = Index(stats.y);
    }
  }

  INLINE Row<V, A> row() const {
    V z_y = {}, own = {}, spread = {};
    for (int i = 0; i < n; i++) {
      z_y[i] = z[y[i]][i];
      own[i] = own_q<A>(call, y[i]);
      if constexpr (F::DENSE) spread[i] = q[y[i]][i];
    }
    return Row<V, A>(m, so, rest, below, z_y, own, own + spread);
  }

  void write_rows(const Row<V, A>& row) {
    const V loss = counts ? row_loss(row, call) : V{};
    for (int i = 0; i < n; i++) static_cast<A*>(call.loss)[first + i] = loss[i];
    if (call.stats)
      for (int i = 0; i < n; i++)
        call.stats[first + i] = Stats{double(m[i]), double(so[i]), double(rest[i]), counts[i] ? double(y[i]) : -1.0};
  }

  // [5] row_grad
  void row_grad(const Slope<V, A>& part) {
    const V k = splat(A(call.options.logit_scale));
    const Lanes<F> dx(call, call.grad, first, n);
    T* const raw = reinterpret_cast<T*>(q);  // never ahead of the q that is read
    for (int64_t c = 0; c < C; c++) {
      V dz = part.p * exp_minus<A, EXACT>(z[c], m);
      if constexpr (F::DENSE) dz -= part.scale * q[c];
      dz = (y == Index(c) ? part.dz_y : dz) * (F::CAP ? slope[c] : k);
      dx.put(raw, c, counts ? dz : V{});
    }
    dx.scatter(raw, C);
  }

  void target_grad(const Row<V, A>& row, V scale) {
    const A* w = static_cast<const A*>(call.weight);
    const V share = scale * A(1 - call.options.label_smoothing);
    A dt[BLOCK];
    for (int i = 0; i < n; i++)
      blocks(C, [&](int64_t begin, int64_t end) LAMBDA {
        for (int64_t c = begin; c < end; c++)
          dt[c - begin] = share[i] * (w ? w[c] : A(1)) * (row.lse_m[i] + (m[i] - z[c][i]));
        write_elements(call.d_target.data, call.d_target.dtype,
                       call.dims.offset(call.d_target, first + i) + begin * call.d_target.class_stride,
                       call.d_target.class_stride, dt, end - begin);
      });
  }

  void write_extras(const Row<V, A>& row) {
    V sum = {};
    for (int64_t c = 0; c < C; c++) {
      const V e_c = exp<A, V, I>(z[c] - m);
      sum += e_c == 0 ? e_c : e_c * (m - z[c]);
    }
    const double L = call.options.lse_square_scale;
    const V entropy = row.lse_m + sum / (row.so + row.e_y);
    for (int i = 0; i < n; i++) {
      const double lse = double(m[i]) + double(row.lse_m[i]);
      call.extras[first + i] =
          counts[i] ? Extras{lse, L == 0 ? 0.0 : L * lse * lse, double(entropy[i]), argmax[i]} : Extras{0, 0, 0, -1};
    }
  }
};

template <class F> void across_rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  TYPES(F);
  const A *upstream = static_cast<const A*>(call.upstream), *g_lse = static_cast<const A*>(call.g_lse);
  for (int64_t first = begin; first < end; first += F::lanes) {
    const int n = end - first < F::lanes ? int(end - first) : F::lanes;
    Bundle<F> bundle(call, first, n, scratch);
    if (call.loss) bundle.row_lse();
    else bundle.read_stats();
    const Row<V, A> row = bundle.row();
    if (call.loss) bundle.write_rows(row);
    if (call.extras) bundle.write_extras(row);
    if (!call.grad.data && !call.d_target.data) continue;
    V scale = splat(A(call.scale)), of_lse = {};
    if (upstream)
      for (int i = 0; i < n; i++) scale[i] = A(call.scale * double(upstream[first + i]));
    if (g_lse) of_lse = load_first(g_lse + first, n);
    if (call.d_target.data) bundle.target_grad(row, scale);
    if (call.grad.data) bundle.row_grad(Slope<V, A>(row, call, scale, of_lse));
  }
}

template <class F> void form_rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  if (call.across) across_rows<F>(call, begin, end, scratch);
  else along_rows<F>(call, begin, end, scratch);
}

template <class T> void rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  const bool cap = call.options.softcap > 0, dense = call.probs || call.options.label_smoothing > 0;
  if (cap && dense) return form_rows<Form<T, true, true>>(call, begin, end, scratch);
  if (cap) return form_rows<Form<T, true, false>>(call, begin, end, scratch);
  if (dense) return form_rows<Form<T, false, true>>(call, begin, end, scratch);
  form_rows<Form<T, false, false>>(call, begin, end, scratch);
}

const RowsFunction rows_functions[4] = {rows<float>, rows<double>, rows<bfloat16>, rows<float16>};  // by DType
