// Rows side by side in the lanes of vectors, where the classes of a row lie apart (N, C, d1..dk; transposed logits) or
// are too few to fill vectors: a group of rows is brought into scratch first, read once. Included inside a namespace,
// once for each instruction set: nothing may be #included here.

template <class F> struct RowGroup {
  TYPES(F);
  typedef decltype(I{}[0] + 0) Index;
  const Call& call;
  const Options o;
  const int64_t first, C;  // the row of lane 0
  const int n;             // rows in use
  V* const z;              // (C) transformed logits; once kept, exp(z - m)
  V* const dz_dx;          // (C) under a softcap
  V* const q;              // (C) spread part of q, if DENSE
  V* const low;            // (C) what z was rounded by, if it is not the logits
  Pair<V> m = {};
  RowSums<V> sums = {};         // their m and z_y are counted from m
  I y = {}, counted = I{} - 1;  // counted: all bits set in rows that are not ignored

  INLINE RowGroup(const Call& call, int64_t first, int n, void* scratch)
      : call(call),
        o(call.options),
        first(first),
        C(call.C),
        n(n),
        z(static_cast<V*>(scratch)),
        dz_dx(z + C),
        q(dz_dx + C),
        low(q + C) {
    if (!call.probs) load_y();
    const bool capped = F::CHANGED && o.softcap > 0 && call.grad.data;
    m.high = splat(-A(__builtin_inff()));
    StridedRows<F>(call, call.input, first, n)
        .read(reinterpret_cast<T*>(q), [&](int64_t c, V x_c) LAMBDA {  // q comes later
          const Pair<V> z_c = transform<F>(x_c, o);
          z[c] = z_c.high;
          if constexpr (F::CHANGED) {
            low[c] = z_c.low;
            const auto larger = (z_c.high > m.high) | ((z_c.high == m.high) & (z_c.low > m.low));
            m.low = larger ? z_c.low : m.low;
          }
          m.high = max(z_c.high, m.high);
          if (capped) dz_dx[c] = transform_grad<F>(x_c, o);
        });
    if constexpr (F::DENSE) load_q();
  }

  INLINE V above_m(int64_t c) const { return F::CHANGED ? low[c] - m.low : V{}; }  // of what z and m were rounded by
  INLINE V drop(int64_t c) const { return m.high - z[c] - above_m(c); }

  INLINE void load_y() {
    Index labels[F::lanes] = {}, counts[F::lanes] = {};
    const View& target = call.target;
    if (target.dtype == DType::int64 && n == F::lanes && call.dims.in_line(first, n) &&
        target.strides[call.dims.rank - 1] == 1) {
      const int64_t* const p = static_cast<const int64_t*>(target.data) + call.dims.offset(target, first);
      constexpr int some = lanes_of<Vec::i64>;
      typedef Index Narrow __attribute__((vector_size(some * sizeof(Index))));
      for (int i = 0; i < F::lanes; i += some) {
        const Vec::i64 label = read<Vec::i64>(p + i), counts_i = label != o.ignore_index;
        write(labels + i, __builtin_convertvector(label & counts_i, Narrow));
        write(counts + i, __builtin_convertvector(counts_i, Narrow));
      }
    } else {
      for (int i = 0; i < n; i++) {
        const int64_t label = call.target_at(call.dims.offset(target, first + i));
        counts[i] = label == o.ignore_index ? 0 : -1;
        labels[i] = Index(label) & counts[i];
      }
    }
    y = read<I>(labels), counted = read<I>(counts);
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

  template <bool KEEP> INLINE void sum() {
    const bool wants_stats = call.stats;
    V so = {}, q_others = {}, q_drop = {}, e_drop = {}, lost[4] = {}, z_y = {}, q_y = {};
    for (int64_t begin = 0; begin < C; begin += 2 * RUN) {
      const int64_t end = begin + 2 * RUN < C ? begin + 2 * RUN : C;
      LaneSums<F> part;
      const auto take = [&](int64_t c, int turn) LAMBDA {
        const auto is_y = y == Index(c);
        const V e_c = exp_minus<A>(z[c], above_m(c), m.high), drop_c = drop(c);
        z_y = is_y ? -drop_c : z_y;
        V q_c = {};
        if constexpr (F::DENSE) {
          q_y = is_y ? q[c] : q_y;
          q_c = is_y ? V{} : q[c];
        }
        row_lse<F>(part, is_y ? V{} : e_c, q_c, [&]() LAMBDA { return is_y ? V{} : drop_c; }, turn, wants_stats);
        if constexpr (KEEP) z[c] = e_c;
      };
      int64_t c = begin;
      for (; c + 2 <= end; c += 2) take(c, 0), take(c + 1, 1);
      if (c < end) take(c, 0);
      add(so, lost[0], part.so[0] + part.so[1]);
      if constexpr (F::DENSE) add(q_others, lost[1], part.q_others), add(q_drop, lost[2], part.q_drop);
      if (wants_stats) add(e_drop, lost[3], part.e_drop);
    }
    sums = {V{}, so + lost[0], z_y, q_y, q_others, q_drop, e_drop, splat(A(-1))};
  }

  INLINE void read_saved() {
    for (int i = 0; i < n; i++) {
      const Saved& saved = call.saved[first + i];
      m.high[i] = A(saved.m), m.low[i] = A(saved.m - double(m.high[i]));
      sums.so[i] = A(saved.so), sums.q_others[i] = A(saved.q_others);
      if (call.probs) y[i] = Index(saved.y);
    }
    for (int64_t c = 0; c < C; c++) {
      const auto is_y = y == Index(c);
      sums.z_y = is_y ? -drop(c) : sums.z_y;
      if constexpr (F::DENSE) sums.q_y = is_y ? q[c] : sums.q_y;
    }
  }

  // Class indices have a share of q of their own, beside the spread part.
  INLINE void add_own_q() {
    V own = splat(own_q<A>(call, 0));
    if (call.weight && !call.probs)
      for (int i = 0; i < n; i++) own[i] = own_q<A>(call, y[i]);
    sums.q_y += own;
  }

  INLINE void write_rows(const RowTerms<V, A>& row) {
    const V loss = counted ? row_loss(row, call) : V{};
    store_first(static_cast<A*>(call.loss) + first, loss, n);
    if (call.saved)
      for (int i = 0; i < n; i++)
        call.saved[first + i] = Saved{double(m.high[i]) + double(m.low[i]), double(sums.so[i]),
                                      double(sums.q_others[i]), counted[i] ? double(y[i]) : -1.0};
  }

  template <bool KEPT> INLINE void write_grad(const GradFactors<V, A>& factors) {
    const bool capped = F::CHANGED && o.softcap > 0;
    const V k = capped ? splat(A(1)) : splat(A(o.logit_scale));
    const V p_scale = k * factors.p_scale, scale = k * factors.scale, dz_y = k * factors.dz_y;
    StridedRows<F>(call, call.grad, first, n)
        .write(reinterpret_cast<T*>(q), [&](int64_t c) LAMBDA {  // never ahead of q
          V e_c = KEPT ? z[c] : exp_minus<A>(z[c], above_m(c), m.high), q_c = {};
          if constexpr (F::DENSE) q_c = q[c];
          V dx_c = row_grad<F>(e_c, q_c, p_scale, scale, false, [] { return V{}; });
          dx_c = y == Index(c) ? dz_y : dx_c;
          if (capped) dx_c *= dz_dx[c];
          return counted ? dx_c : V{};
        });
  }

  void write_target_grad(const RowTerms<V, A>& row, V scale) {
    const A* w = static_cast<const A*>(call.weight);
    const V share = scale * A(1 - o.label_smoothing);
    A dt[BLOCK];
    for (int i = 0; i < n; i++) {
      const int64_t offset = call.dims.offset(call.d_target, first + i);
      for (int64_t begin = 0; begin < C; begin += BLOCK) {
        const int64_t end = begin + BLOCK < C ? begin + BLOCK : C;
        for (int64_t c = begin; c < end; c++)
          dt[c - begin] = target_grad(drop(c)[i], row.lse_m[i], share[i] * (w ? w[c] : A(1)));
        write_elements(call.d_target.data, call.d_target.dtype, offset + begin * call.d_target.class_stride,
                       call.d_target.class_stride, dt, end - begin);
      }
    }
  }

  void write_stats(const RowTerms<V, A>& row, I argmax) {
    const V entropy = row_entropy(row);
    for (int i = 0; i < n; i++)
      call.stats[first + i] = counted[i] ? row_stats(double(m.high[i]) + (double(m.low[i]) + double(row.lse_m[i])),
                                                     double(entropy[i]), o.lse_square_scale, argmax[i])
                                         : Stats{0, 0, 0, -1};
  }
};

template <class F, bool KEEP> void across_rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  TYPES(F);
  const A *upstream = static_cast<const A*>(call.upstream), *g_lse = static_cast<const A*>(call.g_lse);
  for (int64_t first = begin; first < end; first += F::lanes) {
    const int n = end - first < F::lanes ? int(end - first) : F::lanes;
    RowGroup<F> group(call, first, n, scratch);
    I argmax = {};
    if (call.loss && (call.probs || call.stats)) argmax = group.largest();
    if (call.loss && call.probs) group.y = argmax;
    if (call.loss) group.template sum<KEEP>();
    else group.read_saved();
    group.add_own_q();
    const RowTerms<V, A> row(group.sums, group.m.high + group.m.low);
    if (call.loss) group.write_rows(row);
    if (call.stats) group.write_stats(row, argmax);
    if (!call.grad.data && !call.d_target.data) continue;
    V scale = splat(A(call.scale)), of_lse = {};
    if (upstream)
      for (int i = 0; i < n; i++) scale[i] = A(call.scale * double(upstream[first + i]));
    if (g_lse) of_lse = load_first(g_lse + first, n);
    if (call.d_target.data) group.write_target_grad(row, scale);
    if (call.grad.data) group.template write_grad<KEEP>(GradFactors<V, A>(row, call, scale, of_lse));
  }
}

template <class F> void traits_rows(const Call& call, int64_t begin, int64_t end, void* scratch, const Team& team) {
  if (!call.across) along_rows<F>(call, begin, end, scratch, team);
  else if (call.loss && call.grad.data) across_rows<F, true>(call, begin, end, scratch);
  else across_rows<F, false>(call, begin, end, scratch);
}

template <class T> void rows(const Call& call, int64_t begin, int64_t end, void* scratch, const Team& team) {
  const Options& o = call.options;
  const bool changed = o.logit_scale != 1 || o.softcap > 0, dense = call.probs || o.label_smoothing > 0;
  if (changed && dense) return traits_rows<Traits<T, true, true>>(call, begin, end, scratch, team);
  if (changed) return traits_rows<Traits<T, true, false>>(call, begin, end, scratch, team);
  if (dense) return traits_rows<Traits<T, false, true>>(call, begin, end, scratch, team);
  traits_rows<Traits<T, false, false>>(call, begin, end, scratch, team);
}

const RowsFunction rows_functions[4] = {rows<float>, rows<double>, rows<bfloat16>, rows<float16>};  // by DType
