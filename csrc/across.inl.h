// The five functions again where the classes of a row lie apart (N, C, d1..dk; transposed logits) or are too few to
// fill vectors: the lanes are rows side by side, and a bundle of rows is first brought into scratch, read once.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

// One tensor's elements for a bundle of rows, class by class: a row to each lane.
template <class F> struct Lanes {
  TYPES(F);
  const Call& call;
  const View& view;
  const int64_t first, C;
  const int n;
  T* const start;      // class 0 of row `first`
  const int64_t step;  // from row to row
  enum { SIDE_BY_SIDE, ROW_BY_ROW, ONE_BY_ONE } way;

  INLINE Lanes(const Call& call, const View& view, int64_t first, int n)
      : call(call),
        view(view),
        first(first),
        C(call.C),
        n(n),
        start(static_cast<T*>(view.data) + call.dims.offset(view, first)),
        step(view.strides[call.dims.rank - 1]) {
    if (!call.dims.in_line(first, n)) way = ONE_BY_ONE;
    else if (n == F::lanes && step == 1) way = SIDE_BY_SIDE;
    else way = view.class_stride == 1 ? ROW_BY_ROW : ONE_BY_ONE;
  }

  // f(c, class c of all rows). `raw` has room for (C, lanes) elements.
  template <class Function> INLINE void read(T* raw, Function f) const {
    if (way == SIDE_BY_SIDE) {
      for (int64_t c = 0; c < C; c++) f(c, load(start + c * view.class_stride));
    } else if (way == ROW_BY_ROW) {
      for (int64_t c = 0; c < C; c += F::lanes) {
        const int64_t count = C - c < F::lanes ? C - c : F::lanes;
        // A whole vector where what follows the row is the bundle's own.
        const int64_t whole = count == F::lanes ? n : step > 0 ? n - 1 - (F::lanes - count) / step : 0;
        const Tile<V> tile = transpose(read_tile(c, count, whole, InOrder<V>{}));
        for (int64_t j = 0; j < count; j++) f(c + j, tile.v[j]);
      }
    } else {
      // As vectors only when all of it is there: one read right behind the narrow writes that make it up would wait.
      each_row([&](int i, T* p) LAMBDA {
#pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++) raw[c * F::lanes + i] = p ? p[c * view.class_stride] : T{};
      });
      for (int64_t c = 0; c < C; c++) f(c, load(raw + c * F::lanes));
    }
  }
  // f(c): the vector to write for class c.
  template <class Function> INLINE void write(T* raw, Function f) const {
    if (way == SIDE_BY_SIDE) {
      for (int64_t c = 0; c < C; c++) store(start + c * view.class_stride, f(c));
    } else if (way == ROW_BY_ROW) {
      // The last classes first, so that what they write past a row's end is written over by the next row.
      for (int64_t c = (C - 1) / F::lanes * F::lanes; c >= 0; c -= F::lanes) {
        const int64_t count = C - c < F::lanes ? C - c : F::lanes;
        const int64_t whole = count == F::lanes ? n : step == C ? n - 1 - (F::lanes - count) / C : 0;
        write_tile(transpose(tile_of(c, f, InOrder<V>{})), c, count, whole, InOrder<V>{});
      }
    } else {
      for (int64_t c = 0; c < C; c++) store(raw + c * F::lanes, f(c));
      each_row([&](int i, T* p) LAMBDA {
        if (!p) return;
#pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++) p[c * view.class_stride] = raw[c * F::lanes + i];
      });
    }
  }

 private:
  INLINE V read_row(int i, int64_t c, int64_t count, int64_t whole) const {
    return i < whole ? load(start + i * step + c) : i < n ? load_first(start + i * step + c, count) : V{};
  }
  template <int... i> INLINE Tile<V> read_tile(int64_t c, int64_t count, int64_t whole, Order<i...>) const {
    return {{read_row(i, c, count, whole)...}};
  }
  template <class Function, int... j> INLINE Tile<V> tile_of(int64_t c, Function f, Order<j...>) const {
    return {{(c + j < C ? f(c + j) : V{})...}};
  }
  INLINE void write_row(int i, V v, int64_t c, int64_t count, int64_t whole) const {
    if (i < whole) store(start + i * step + c, v);
    else if (i < n) store_first(start + i * step + c, v, count);
  }
  template <int... i>
  INLINE void write_tile(const Tile<V>& tile, int64_t c, int64_t count, int64_t whole, Order<i...>) const {
    (write_row(i, tile.v[i], c, count, whole), ...);
  }
  template <class Function> INLINE void each_row(Function f) const {
    for (int i = 0; i < F::lanes; i++)
      f(i, i < n ? static_cast<T*>(view.data) + call.dims.offset(view, first + i) : nullptr);
  }
};

template <class F> struct Bundle {
  TYPES(F);
  typedef decltype(I{}[0] + 0) Index;
  const Call& call;
  const Options o;
  const int64_t first, C;                               // the row of lane 0
  const int n;                                          // rows in use
  V* const z;                                           // (C) transformed logits; once kept, exp(z - m)
  V* const slope;                                       // (C) dz/dx, under a softcap
  V* const q;                                           // (C) spread part of q, if DENSE
  V m = {}, so = {}, rest = {}, below = {}, heat = {};  // as in Sums
  V z_y = {}, q_y = {};                                 // of class y; q_y its spread part
  I y = {}, counts = I{} - 1;                           // counts: all bits set in rows that are not ignored

  INLINE Bundle(const Call& call, int64_t first, int n, void* scratch)
      : call(call),
        o(call.options),
        first(first),
        C(call.C),
        n(n),
        z(static_cast<V*>(scratch)),
        slope(z + C),
        q(slope + C) {
    if (!call.probs) load_y();
    const bool capped = F::CHANGED && o.softcap > 0 && call.grad.data;
    V most = splat(-A(__builtin_inff()));
    Lanes<F>(call, call.input, first, n).read(reinterpret_cast<T*>(q), [&](int64_t c, V x_c) LAMBDA {  // q comes later
      z[c] = transform<F>(x_c, o);
      most = max(z[c], most);
      if (capped) slope[c] = transform_grad<F>(x_c, o);
    });
    m = most;
    if constexpr (F::DENSE) load_q();
  }

  INLINE void load_y() {
    Index labels[F::lanes] = {}, valid[F::lanes] = {};
    const View& target = call.target;
    if (target.dtype == DType::int64 && n == F::lanes && call.dims.in_line(first, n) &&
        target.strides[call.dims.rank - 1] == 1) {
      // Several labels at a time.
      const int64_t* const p = static_cast<const int64_t*>(target.data) + call.dims.offset(target, first);
      constexpr int some = lanes_of<Vec::i64>;
      typedef Index Narrow __attribute__((vector_size(some * sizeof(Index))));
      for (int i = 0; i < F::lanes; i += some) {
        const Vec::i64 label = read<Vec::i64>(p + i), counts = label != o.ignore_index;
        write(labels + i, __builtin_convertvector(label & counts, Narrow));
        write(valid + i, __builtin_convertvector(counts, Narrow));
      }
    } else {
      for (int i = 0; i < n; i++) {
        const int64_t label = call.target_at(call.dims.offset(target, first + i));
        valid[i] = label == o.ignore_index ? 0 : -1;
        labels[i] = Index(label) & valid[i];
      }
    }
    y = read<I>(labels), counts = read<I>(valid);
  }

  void load_q() {
    A block[BLOCK];
    for (int i = 0; i < (call.probs ? n : 1); i++) {
      const int64_t offset = call.probs ? call.dims.offset(call.target, first + i) : 0;
      for (int64_t begin = 0; begin < C; begin += BLOCK) {
        const int64_t end = begin + BLOCK < C ? begin + BLOCK : C;
        spread_q(block, call, offset, begin, end);
        for (int64_t c = begin; c < end; c++)
          if (call.probs) q[c][i] = block[c - begin];
          else q[c] = splat(block[c - begin]);
      }
    }
  }

  I largest() const {
    I at = {};
    V best = z[0];
    for (int64_t c = 1; c < C; c++) {
      const auto larger = (z[c] > best) | ((z[c] != z[c]) & (best == best));  // a NaN counts as largest, as in torch
      best = larger ? z[c] : best;
      at = larger ? I{} + Index(c) : at;
    }
    return at;
  }

  // [3] row_lse
  template <bool KEEP> INLINE void row_lse() {
    const bool wants_heat = call.extras;
    V lost = {}, lost_q = {}, lost_below = {}, lost_heat = {};
    for (int64_t begin = 0; begin < C; begin += 2 * RUN) {
      const int64_t end = begin + 2 * RUN < C ? begin + 2 * RUN : C;
      V sum[2] = {}, sum_below = {}, sum_q = {}, sum_heat = {};
      const auto take = [&](int64_t c, int turn) LAMBDA {
        const auto is_y = y == Index(c);
        const V z_c = z[c], e_c = exp_minus<A>(z_c, m);
        z_y = is_y ? z_c : z_y;
        sum[turn] += is_y ? V{} : e_c;
        if constexpr (F::DENSE) {
          q_y = is_y ? q[c] : q_y;
          sum_q += is_y ? V{} : q[c];
          sum_below += q[c] * (m - z_c);
        }
        if (wants_heat) sum_heat += e_c == 0 ? e_c : e_c * (m - z_c);
        if constexpr (KEEP) z[c] = e_c;
      };
      int64_t c = begin;
      for (; c + 2 <= end; c += 2) take(c, 0), take(c + 1, 1);
      if (c < end) take(c, 0);
      add(so, lost, sum[0] + sum[1]);
      if constexpr (F::DENSE) add(rest, lost_q, sum_q), add(below, lost_below, sum_below);
      if (wants_heat) add(heat, lost_heat, sum_heat);
    }
    so += lost;
  }

  INLINE void read_stats() {
    for (int i = 0; i < n; i++) {
      const Stats& stats = call.stats[first + i];
      m[i] = A(stats.m), so[i] = A(stats.so), rest[i] = A(stats.rest);
      if (call.probs) y[i] = Index(stats.y);
    }
    for (int64_t c = 0; c < C; c++) {
      const auto is_y = y == Index(c);
      z_y = is_y ? z[c] : z_y;
      if constexpr (F::DENSE) q_y = is_y ? q[c] : q_y;
    }
  }

  INLINE Row<V, A> row() const {
    V own = splat(own_q<A>(call, 0));
    if (call.weight && !call.probs)
      for (int i = 0; i < n; i++) own[i] = own_q<A>(call, y[i]);
    return Row<V, A>(m, so, rest, below, z_y, own, own + q_y);
  }

  INLINE void write_rows(const Row<V, A>& row) {
    const V loss = counts ? row_loss(row, call) : V{};
    store_first(static_cast<A*>(call.loss) + first, loss, n);
    if (call.stats)
      for (int i = 0; i < n; i++)
        call.stats[first + i] = Stats{double(m[i]), double(so[i]), double(rest[i]), counts[i] ? double(y[i]) : -1.0};
  }

  // [5] row_grad
  template <bool KEEP> INLINE void row_grad(const Slope<V, A>& part) {
    const bool capped = F::CHANGED && o.softcap > 0;
    const V k = capped ? splat(A(1)) : splat(A(o.logit_scale));
    const V p = k * part.p, scale = k * part.scale, dz_y = k * part.dz_y;
    Lanes<F>(call, call.grad, first, n).write(reinterpret_cast<T*>(q), [&](int64_t c) LAMBDA {  // never ahead of q
      V dx_c = p * (KEEP ? z[c] : exp_minus<A>(z[c], m));
      if constexpr (F::DENSE) dx_c -= scale * q[c];
      dx_c = y == Index(c) ? dz_y : dx_c;
      if (capped) dx_c *= slope[c];
      return counts ? dx_c : V{};
    });
  }

  void target_grad(const Row<V, A>& row, V scale) {
    const A* w = static_cast<const A*>(call.weight);
    const V share = scale * A(1 - o.label_smoothing);
    A dt[BLOCK];
    for (int i = 0; i < n; i++) {
      const int64_t offset = call.dims.offset(call.d_target, first + i);
      for (int64_t begin = 0; begin < C; begin += BLOCK) {
        const int64_t end = begin + BLOCK < C ? begin + BLOCK : C;
        for (int64_t c = begin; c < end; c++)
          dt[c - begin] = share[i] * (w ? w[c] : A(1)) * (row.lse_m[i] + (m[i] - z[c][i]));
        write_elements(call.d_target.data, call.d_target.dtype, offset + begin * call.d_target.class_stride,
                       call.d_target.class_stride, dt, end - begin);
      }
    }
  }

  void write_extras(const Row<V, A>& row, I argmax) {
    const double L = o.lse_square_scale;
    const V entropy = row.lse_m + heat / (row.so + row.e_y);
    for (int i = 0; i < n; i++) {
      const double lse = double(m[i]) + double(row.lse_m[i]);
      call.extras[first + i] =
          counts[i] ? Extras{lse, L == 0 ? 0.0 : L * lse * lse, double(entropy[i]), argmax[i]} : Extras{0, 0, 0, -1};
    }
  }
};

template <class F, bool KEEP> void across_rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  TYPES(F);
  const A *upstream = static_cast<const A*>(call.upstream), *g_lse = static_cast<const A*>(call.g_lse);
  for (int64_t first = begin; first < end; first += F::lanes) {
    const int n = end - first < F::lanes ? int(end - first) : F::lanes;
    Bundle<F> bundle(call, first, n, scratch);
    I argmax = {};
    if (call.loss && (call.probs || call.extras)) argmax = bundle.largest();
    if (call.loss && call.probs) bundle.y = argmax;
    if (call.loss) bundle.template row_lse<KEEP>();
    else bundle.read_stats();
    const Row<V, A> row = bundle.row();
    if (call.loss) bundle.write_rows(row);
    if (call.extras) bundle.write_extras(row, argmax);
    if (!call.grad.data && !call.d_target.data) continue;
    V scale = splat(A(call.scale)), of_lse = {};
    if (upstream)
      for (int i = 0; i < n; i++) scale[i] = A(call.scale * double(upstream[first + i]));
    if (g_lse) of_lse = load_first(g_lse + first, n);
    if (call.d_target.data) bundle.target_grad(row, scale);
    if (call.grad.data) bundle.template row_grad<KEEP>(Slope<V, A>(row, call, scale, of_lse));
  }
}

template <class F> void form_rows(const Call& call, int64_t begin, int64_t end, void* scratch, const Team& team) {
  if (!call.across) along_rows<F>(call, begin, end, scratch, team);
  else if (call.loss && call.grad.data) across_rows<F, true>(call, begin, end, scratch);
  else across_rows<F, false>(call, begin, end, scratch);
}

template <class T> void rows(const Call& call, int64_t begin, int64_t end, void* scratch, const Team& team) {
  const Options& o = call.options;
  const bool changed = o.logit_scale != 1 || o.softcap > 0, dense = call.probs || o.label_smoothing > 0;
  if (changed && dense) return form_rows<Form<T, true, true>>(call, begin, end, scratch, team);
  if (changed) return form_rows<Form<T, true, false>>(call, begin, end, scratch, team);
  if (dense) return form_rows<Form<T, false, true>>(call, begin, end, scratch, team);
  form_rows<Form<T, false, false>>(call, begin, end, scratch, team);
}

const RowsFunction rows_functions[4] = {rows<float>, rows<double>, rows<bfloat16>, rows<float16>};  // by DType
