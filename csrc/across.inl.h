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
  INLINE V get(int64_t c) const {
    if (side_by_side) return load(p[0] + c * stride);
    T element[F::lanes] = {};
    for (int i = 0; i < n; i++) element[i] = p[i][c * stride];
    return load(element);
  }
  INLINE void put(int64_t c, V v) const {
    if (side_by_side) return store(p[0] + c * stride, v);
    T element[F::lanes];
    store(element, v);
    for (int i = 0; i < n; i++) p[i][c * stride] = element[i];
  }
};

template <class F> struct Bundle {
  TYPES(F);
  typedef decltype(I{}[0] + 0) Index;
  const Call& call;
  const int64_t first, C;  // the row of lane 0
  const int n;             // rows in use
  V* const z;              // (C) transformed logits
  V* const slope;          // (C) dz/dx
  V* const q;              // (C) spread part of q, if DENSE
  Sums sums[F::lanes];
  I argmax;

  INLINE Stats& stats(int lane) { return sums[lane].stats; }
  INLINE bool ignored(int lane) { return stats(lane).y < 0; }

  Bundle(const Call& call, int64_t first, int n, void* scratch)
      : call(call), first(first), C(call.C), n(n), z(static_cast<V*>(scratch)), slope(z + C), q(slope + C) {
    for (int i = 0; i < n; i++) {
      sums[i] = Sums{call.loss ? Stats{} : call.stats[first + i], 0};
      if (call.probs) continue;
      const int64_t y = call.target_index(first + i);
      stats(i).y = y == call.options.ignore_index ? -1.0 : double(y);
    }
    const Lanes<F> x(call, call.input, first, n);
    for (int64_t c = 0; c < C; c++) {
      const V x_c = x.get(c);
      z[c] = transform<F>(x_c, call.options);
      if (F::CAP && call.grad.data) slope[c] = transform_grad<F>(x_c, call.options);
    }
    for (int i = 0; i < n; i++)
      if (ignored(i))
        for (int64_t c = 0; c < C; c++) z[c][i] = 0;
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
    V m = z[0];
    argmax = I{};
    for (int64_t c = 1; c < C; c++) {
      const auto larger = z[c] > m;
      m = larger ? z[c] : m;
      argmax = larger ? I{} + Index(c) : argmax;
    }
    I y = {};
    for (int i = 0; i < n; i++) {
      if (call.probs) stats(i).y = argmax[i];
      y[i] = Index(stats(i).y);
      stats(i).m = m[i];
    }
    constexpr int64_t STEP = 64;  // classes added up in acc before they join the doubles
    for (int64_t begin = 0; begin < C; begin += STEP) {
      const int64_t end = begin + STEP < C ? begin + STEP : C;
      V sum = {}, sum_below = {}, sum_q = {};
      for (int64_t c = begin; c < end; c++) {
        const auto is_y = y == Index(c);
        sum += is_y ? V{} : exp<A, V, I>(z[c] - m);
        if constexpr (F::DENSE) {
          sum_q += is_y ? V{} : q[c];
          sum_below += q[c] * (m - z[c]);
        }
      }
      for (int i = 0; i < n; i++) {
        stats(i).so += sum[i];
        stats(i).rest += sum_q[i];
        sums[i].below += sum_below[i];
      }
    }
  }

  // [5] row_grad
  void row_grad(const Slope* part) {
    V m = {}, p = {}, scale = {}, dz_y = {};
    I y = {}, keep = {};
    for (int i = 0; i < n; i++) {
      if (ignored(i)) continue;
      m[i] = A(stats(i).m);
      p[i] = A(part[i].p);
      scale[i] = A(part[i].scale);
      dz_y[i] = A(part[i].dz_y);
      y[i] = Index(stats(i).y);
      keep[i] = -1;
    }
    const V k = splat(A(call.options.logit_scale));
    const Lanes<F> dx(call, call.grad, first, n);
    for (int64_t c = 0; c < C; c++) {
      V dz = p * exp<A, V, I>(z[c] - m);
      if constexpr (F::DENSE) dz -= scale * q[c];
      dz = (y == Index(c) ? dz_y : dz) * (F::CAP ? slope[c] : k);
      dx.put(c, keep ? dz : V{});
    }
  }

  void target_grad(const Row* row, const Slope* part) {
    const A* w = static_cast<const A*>(call.weight);
    const double share = 1 - call.options.label_smoothing;
    A dt[BLOCK];
    for (int i = 0; i < n; i++)
      blocks(C, [&](int64_t begin, int64_t end) LAMBDA {
        for (int64_t c = begin; c < end; c++) {
          const double minus_log_p = row[i].lse_m + (stats(i).m - double(z[c][i]));
          dt[c - begin] = A(part[i].scale * share * (w ? double(w[c]) : 1.0) * minus_log_p);
        }
        write_elements(call.d_target.data, call.d_target.dtype,
                       call.dims.offset(call.d_target, first + i) + begin * call.d_target.class_stride,
                       call.d_target.class_stride, dt, end - begin);
      });
  }

  Extras row_extras(int i, const Row& row) {
    double sum = 0;
    for (int64_t c = 0; c < C; c++) {
      const double below = stats(i).m - double(z[c][i]), e_c = __builtin_exp(-below);
      if (!(e_c == 0)) sum += e_c * below;
    }
    const double lse = stats(i).m + row.lse_m, L = call.options.lse_square_scale;
    return {lse, L == 0 ? 0.0 : L * lse * lse, row.lse_m + sum / (stats(i).so + row.e_y), argmax[i]};
  }
};

template <class F> void across_rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  TYPES(F);
  const A *upstream = static_cast<const A*>(call.upstream), *g_lse = static_cast<const A*>(call.g_lse);
  for (int64_t first = begin; first < end; first += F::lanes) {
    const int n = end - first < F::lanes ? int(end - first) : F::lanes;
    Bundle<F> bundle(call, first, n, scratch);
    if (call.loss) bundle.row_lse();
    Row row[F::lanes];
    Slope part[F::lanes];
    for (int i = 0; i < n; i++) {
      const int64_t r = first + i;
      if (bundle.ignored(i)) {
        write_ignored<A>(call, r);
        continue;
      }
      const Stats& stats = bundle.stats(i);
      row[i] =
          Row::at<A>(bundle.z[int64_t(stats.y)][i], stats, call, call.probs ? call.dims.offset(call.target, r) : 0);
      if (call.loss) write_row<A>(call, r, row_loss(bundle.sums[i], row[i], call), stats);
      if (call.extras) call.extras[r] = bundle.row_extras(i, row[i]);
      part[i] = Slope::of(stats, row[i], call, call.scale * (upstream ? double(upstream[r]) : 1.0),
                          g_lse ? double(g_lse[r]) : 0.0);
    }
    if (call.d_target.data) bundle.target_grad(row, part);
    if (call.grad.data) bundle.row_grad(part);
  }
}

template <class F> void form_rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  if (call.across) across_rows<F>(call, begin, end, scratch);
  else along_rows<F>(call, begin, end);
}

template <class T> void rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  const bool cap = call.options.softcap > 0, dense = call.probs || call.options.label_smoothing > 0;
  if (cap && dense) return form_rows<Form<T, true, true>>(call, begin, end, scratch);
  if (cap) return form_rows<Form<T, true, false>>(call, begin, end, scratch);
  if (dense) return form_rows<Form<T, false, true>>(call, begin, end, scratch);
  form_rows<Form<T, false, false>>(call, begin, end, scratch);
}

const RowsFunction rows_functions[4] = {rows<float>, rows<double>, rows<bfloat16>, rows<float16>};  // by DType
