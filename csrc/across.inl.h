// Rows side by side in the lanes of vectors, where the classes of a row lie apart (N, C, d1..dk; transposed logits) or
// are too few to fill vectors: a group of rows is brought into scratch first.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

// The upstream gradient of each row, and the headroom (math.inl.h) that exp(z - m) has for it.
template <class F> struct Scales {
  TYPES(F);
  V scale, lowest, t_0, unit;  // lowest, t_0: see exp_above; exp(z - m) is kept in units of `unit`

  INLINE Scales(V scale, V headroom)
      : scale(scale),
        lowest(Constants<A>::lowest - headroom * A(0.69314718055994530942)),
        t_0(Constants<A>::round - headroom),
        unit(multiply_power(V{}, t_0, splat(Constants<A>::round))) {}

  INLINE explicit Scales(const Call& call) : Scales(splat(A(call.scale)), splat(A(headroom(call.scale)))) {}
  static INLINE Scales of_rows(const Call& call, int64_t first, int n) {
    const V scale = A(call.scale) * load_first(static_cast<const A*>(call.upstream) + first, n);
    return Scales(scale, headroom_of<A>(scale));
  }
};

// Classes are taken in chunks of MOST_KEPT. Almost every call has but one, which is read once and kept from the sums to
// the gradient; of MANY each is read again, so that scratch stays small. Loops work on copies of the members: a store
// to scratch might be one to a member, for all that the compiler knows.
template <class F, bool MANY> struct RowGroup {
  TYPES(F);
  typedef decltype(I{}[0] + 0) Index;
  static constexpr bool TWO_PARTS = F::CHANGED && sizeof(A) == 4;  // of m
  const Call& call;
  const Options o;
  const int64_t room;  // classes that there is room for
  V* const z;          // transformed logits of the chunk; once kept, exp(z - m)
  V* const dz_dx;      // under a softcap
  V* const q;          // spread part of q, if DENSE
  V* const low;        // what z was rounded by, if it is not the logits
  const Scales<F> scales;
  Part part;  // the chunk
  Pair<V> m = {splat(-A(__builtin_inff())), V{}};
  RowSums<V> sums;    // their m and z_y are counted from m
  V lost[4];          // of so, q_others, q_drop, e_drop
  Pair<V> best = {};  // the largest z so far
  I largest = {};     // and its class
  Labels<F> labels;

  INLINE RowGroup(const Call& call, int64_t first, int n, void* scratch, const Scales<F>& scales)
      : call(call),
        o(call.options),
        room(call.C < MOST_KEPT ? call.C : MOST_KEPT),
        z(static_cast<V*>(scratch)),
        dz_dx(z + room),
        q(dz_dx + room),
        low(q + room),
        scales(scales) {
    // One by one: g++ clears a whole struct by a slow string instruction.
    sums.m = sums.so = sums.z_y = sums.q_y = sums.q_others = sums.q_drop = sums.e_drop = V{};
    for (V& of_sum : lost) of_sum = V{};
    part.first = first, part.n = n;
    call.dims.find(first, part.place);
    if (!call.probs) labels = load_labels<F>(call, part);
    load(MANY ? (call.C - 1) / MOST_KEPT * MOST_KEPT : 0);
  }

  // Work on each chunk, the last first, so that the one that is left after the sums is the first for the gradient.
  template <class Work> INLINE void for_each_chunk(Work work) {
    if constexpr (!MANY) return work();
    for (int64_t from = (call.C - 1) / MOST_KEPT * MOST_KEPT; from >= 0; from -= MOST_KEPT) {
      if (from != part.begin) load(from);
      work();
    }
  }

  INLINE int64_t start() const { return MANY ? part.begin : 0; }
  INLINE int64_t count() const { return MANY ? part.end - part.begin : call.C; }

  INLINE void load(int64_t from) {
    part.begin = from, part.end = from + MOST_KEPT < call.C ? from + MOST_KEPT : call.C;
    Pair<V> m = this->m;
    const bool capped = F::CHANGED && o.softcap > 0 && call.grad.data;
    // q comes later.
    StridedRows<F>(call, call.input, part).read(reinterpret_cast<T*>(q), [&](int64_t c, V x_c) LAMBDA {
      const Pair<V> z_c = transform<F>(x_c, o);
      z[c] = z_c.high;
      if constexpr (F::CHANGED) {
        low[c] = z_c.low;
        m.low = exceeds(z_c, m) ? z_c.low : m.low;
      }
      m.high = max(z_c.high, m.high);
      if (capped) dz_dx[c] = transform_grad<F>(x_c, o);
    });
    this->m = m;
    if constexpr (F::DENSE) load_q<F>(q, call, part);
  }

  static INLINE auto exceeds(const Pair<V>& a, const Pair<V>& b) {
    return (a.high > b.high) | ((a.high == b.high) & (a.low > b.low));
  }
  INLINE Pair<V> z_of(int64_t i) const { return {z[i], F::CHANGED ? low[i] : V{}}; }
  INLINE V exp_of_z(int64_t i, const Pair<V>& m) const {
    if constexpr (F::CHANGED) return exp_minus<A>(z_of(i), m, scales.lowest, scales.t_0);
    else return exp_minus<A>(z[i], m.high, scales.lowest, scales.t_0);
  }

  // Of equals the first; a NaN counts as largest, as in torch. The chunks come last first.
  void find_largest() {
    I at = {};
    Pair<V> most = z_of(0);
    for (int64_t i = 1; i < count(); i++) {
      const Pair<V> z_c = z_of(i);
      const auto larger = exceeds(z_c, most) | ((z_c.high != z_c.high) & (most.high == most.high));
      most.high = larger ? z_c.high : most.high;
      most.low = larger ? z_c.low : most.low;
      at = larger ? I{} + Index(i) : at;
    }
    const auto takes = start() + count() == call.C ? I{} - 1 : ~exceeds(best, most) | (most.high != most.high);
    best.high = takes ? most.high : best.high;
    best.low = takes ? most.low : best.low;
    largest = takes ? at + Index(start()) : largest;
  }

  // Adds the chunk's classes to the sums.
  template <bool KEEP> INLINE void add_chunk() {
    const bool wants_stats = call.stats;
    const Pair<V> m = this->m;
    const I y = labels.y - Index(start());
    RowSums<V> sums = this->sums;
    V z_y = sums.z_y;
    V lost[4] = {this->lost[0], this->lost[1], this->lost[2], this->lost[3]};
    for (int64_t from = 0; from < count(); from += 2 * RUN) {
      const int64_t to = from + 2 * RUN < count() ? from + 2 * RUN : count();
      LaneSums<F> part;
      const auto take = [&](int64_t i, int turn) LAMBDA {
        const auto is_y = y == Index(i);
        const V e_c = exp_of_z(i, m), rise = minus<F>(z_of(i), m);
        z_y = is_y ? rise : z_y;
        V q_c = {};
        if constexpr (F::DENSE) {
          sums.q_y = is_y ? q[i] : sums.q_y;
          q_c = is_y ? V{} : q[i];
        }
        row_lse<F>(part, is_y ? V{} : e_c, q_c, [&]() LAMBDA { return is_y ? V{} : -rise; }, turn, wants_stats);
        if constexpr (KEEP) z[i] = e_c;
      };
      int64_t i = from;
      for (; i + 2 <= to; i += 2) take(i, 0), take(i + 1, 1);
      if (i < to) take(i, 0);
      add(sums.so, lost[0], part.so[0] + part.so[1]);
      if constexpr (F::DENSE) add(sums.q_others, lost[1], part.q_others), add(sums.q_drop, lost[2], part.q_drop);
      if (wants_stats) add(sums.e_drop, lost[3], part.e_drop);
    }
    sums.z_y = z_y;
    this->sums = sums;
    for (int i = 0; i < 4; i++) this->lost[i] = lost[i];
  }

  INLINE void read_saved() {
    const auto read = [&](SavedColumn which) LAMBDA { return load_first(column(which), part.n); };
    const Pair<V> of_row = {read(SAVED_M), TWO_PARTS ? load_first(column(SAVED_M) + call.rows, part.n) : V{}};
    sums.so = read(SAVED_SO);
    if constexpr (F::DENSE) sums.q_others = read(SAVED_Q_OTHERS);
    if (call.probs) labels.y = (I)read(SAVED_Y);
    for_each_chunk([&]() LAMBDA {
      m = of_row;  // which loading a chunk has raised to what it holds, rounded
      for (int64_t i = 0; i < count(); i++) {
        const auto is_y = labels.y == Index(start() + i);
        sums.z_y = is_y ? minus<F>(z_of(i), of_row) : sums.z_y;
        if constexpr (F::DENSE) sums.q_y = is_y ? q[i] : sums.q_y;
      }
    });
  }

  // Class indices have a share of q of their own, beside the spread part.
  INLINE void add_own_q() {
    V own = splat(own_q<A>(call, 0));
    if (call.weight && !call.probs)
      own = A(1 - o.label_smoothing) * gather(static_cast<const A*>(call.weight), labels.y);
    sums.q_y += own;
  }

  INLINE void write_rows(const RowTerms<V, A>& row) {
    const V loss = labels.counted ? row_loss(row, call) : V{};
    store_first(static_cast<A*>(call.loss) + part.first, loss, part.n);
    if (!call.saved) return;
    const auto write = [&](SavedColumn which, V high, V low) LAMBDA {
      store_first(column(which), high, part.n);
      if (sizeof(A) == 4) store_first(column(which) + call.rows, low, part.n);
    };
    write(SAVED_M, m.high, m.low), write(SAVED_SO, sums.so, V{});
    write(SAVED_Q_OTHERS, sums.q_others, V{});
    if (call.probs) write(SAVED_Y, (V)labels.y, V{});
  }

  // This group's part of a saved column, or of its first half.
  INLINE A* column(SavedColumn which) const { return reinterpret_cast<A*>(call.column(which)) + part.first; }

  template <bool KEPT> INLINE void write_grad(const GradFactors<V, A>& factors) {
    const bool capped = F::CHANGED && o.softcap > 0;
    const V k = capped ? splat(A(1)) : splat(A(o.logit_scale));
    const V p_scale = k * factors.p_scale * scales.unit, scale = k * factors.scale, dz_y = k * factors.dz_y;
    const Pair<V> m = this->m;
    const I y = labels.y - Index(start()), counted = labels.counted;
    StridedRows<F>(call, call.grad, part).write(reinterpret_cast<T*>(q), [&](int64_t i) LAMBDA {  // never ahead of q
      V e_c = KEPT ? z[i] : exp_of_z(i, m), q_c = {};
      if constexpr (F::DENSE) q_c = q[i];
      V dx_c = row_grad<F>(e_c, q_c, p_scale, scale, false, [] { return V{}; });
      dx_c = y == Index(i) ? dz_y : dx_c;
      if (capped) dx_c *= dz_dx[i];
      return counted ? dx_c : V{};
    });
  }

  void write_target_grad(const RowTerms<V, A>& row, V scale) {
    const A* w = static_cast<const A*>(call.weight);
    const V share = scale * A(1 - o.label_smoothing);
    const Pair<V> m = this->m;
    // Into q, which is not needed any more.
    write_probs_grad<F>(q, call, part, [&](int64_t i) LAMBDA {
      return target_grad(-minus<F>(z_of(i), m), row.lse_m, w ? share * w[start() + i] : share);
    });
  }

  void write_stats(const RowTerms<V, A>& row, I argmax) {
    const V entropy = row_entropy(row);
    for (int i = 0; i < part.n; i++)
      call.stats[part.first + i] = labels.counted[i]
                                       ? row_stats(double(m.high[i]) + (double(m.low[i]) + double(row.lse_m[i])),
                                                   double(entropy[i]), o.lse_square_scale, argmax[i])
                                       : Stats{0, 0, 0, -1};
  }
};

template <class F, bool KEEP, bool MANY> void across_rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  TYPES(F);
  const A* const g_lse = static_cast<const A*>(call.g_lse);
  const Scales<F> of_call(call);
  for (int64_t first = begin; first < end; first += F::lanes) {
    const int n = end - first < F::lanes ? int(end - first) : F::lanes;
    const Scales<F> scales = call.upstream ? Scales<F>::of_rows(call, first, n) : of_call;
    RowGroup<F, MANY> group(call, first, n, scratch, scales);
    if (call.loss) {
      const bool ranks = call.probs || call.stats;
      group.for_each_chunk([&]() LAMBDA {
        if (ranks) group.find_largest();
      });
      if (call.probs) group.labels.y = group.largest;
      group.for_each_chunk([&]() LAMBDA { group.template add_chunk<KEEP>(); });
      group.sums.so = (group.sums.so + group.lost[0]) * scales.unit;
      group.sums.e_drop *= scales.unit;
    } else {
      group.read_saved();
    }
    group.add_own_q();
    const RowTerms<V, A> row(group.sums, group.m.high + group.m.low);
    if (call.loss) group.write_rows(row);
    if (call.stats) group.write_stats(row, group.largest);
    if (!call.grad.data && !call.d_target.data) continue;
    V of_lse = {};
    if (g_lse) of_lse = load_first(g_lse + first, n);
    const GradFactors<V, A> factors(row, call, scales.scale, of_lse);
    group.for_each_chunk([&]() LAMBDA {
      if (call.grad.data) group.template write_grad<KEEP>(factors);
      if (call.d_target.data) group.write_target_grad(row, scales.scale);
    });
  }
}
