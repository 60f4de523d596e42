// Rows side by side in the lanes of vectors, where the classes of a row lie apart (N, C, d1..dk; transposed logits) or
// are too few to fill vectors: a group of rows is brought into scratch first.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

// The upstream gradient of each row, and the headroom (math.inl.h) that exp(z - m) has for it.
template <class F> struct Scales {
  TYPES(F);
  V scale, powers;

  static INLINE Scales of_call(const Call& call) { return {splat(A(call.scale)), splat(A(headroom(call.scale)))}; }
  static INLINE Scales of_rows(const Call& call, int64_t first, int n) {
    const V scale = A(call.scale) * load_first(static_cast<const A*>(call.upstream) + first, n);
    return {scale, headroom_of<A>(scale)};
  }
};

// Classes are taken in chunks of MOST_KEPT. Almost every call has but one, which is read once and kept from the sums to
// the gradient; of MANY each is read again, so that scratch stays small. Loops work on copies of the members: a store
// to scratch might be one to a member, for all that the compiler knows.
template <class F, bool MANY> struct RowGroup {
  TYPES(F);
  typedef decltype(I{}[0] + 0) Index;
  const Call* of;
  Part part;  // the chunk
  V* z;       // transformed logits of the chunk
  Scales<F> scales;
  Pair<V> m, z_y;
  RowSums<V> sums;  // of MANY, chunk by chunk
  V lost[4];        // of so, q_others, q_drop, e_drop
  I largest;        // the class, for statistics
  I finds_y;        // all bits set where the class to leave out is still looked for, under probabilities
  Labels<F> labels;
  MinusLanes<A> minus_m;
  V p_scale, scale, dz_y, h_scale, lse_m;  // what the gradients need of RowTerms and GradFactors

  INLINE V* dz_dx() const { return z + across_room(*of); }    // under a softcap
  INLINE V* q() const { return z + 2 * across_room(*of); }    // spread part of q, if DENSE
  INLINE V* low() const { return z + 3 * across_room(*of); }  // what z was rounded by, if it is not the logits
  // Kept in z's place, unless the gradient of probabilities will read z. Of MANY not kept.
  INLINE V* e() const { return of->d_target.data ? z + 4 * across_room(*of) : z; }

  INLINE void start(const Call& call, const Part& rows, V* scratch) {
    of = &call, z = scratch;
    // One by one: a wide copy right after narrow stores defeats store forwarding.
    part.first = rows.first, part.n = rows.n;
    part.place.at[0] = rows.place.at[0], part.place.at[1] = rows.place.at[1];
    for (int d = 2; d < call.dims.rank; d++) part.place.at[d] = rows.place.at[d];
    m = {splat(-A(__builtin_inff())), V{}};
    // One by one: g++ clears a whole struct by a slow string instruction.
    if constexpr (MANY) {
      z_y.high = z_y.low = sums.so = sums.q_y = sums.q_others = sums.q_drop = sums.e_drop = V{};
      for (V& of_sum : lost) of_sum = V{};
    }
    finds_y = I{} - Index(call.probs);
    labels = call.probs ? Labels<F>{} : load_labels<F>(call, part);
    if constexpr (MANY) apart<&RowGroup::load>((call.C - 1) / MOST_KEPT * MOST_KEPT);
    else load(0);
  }

  // A step on each chunk, the last first, so that the one that is left after the sums is the first for the gradient.
  template <auto step, class... Args> INLINE void for_each_chunk(Args... args) {
    if constexpr (!MANY) return (this->*step)(args...);
    for (int64_t from = (of->C - 1) / MOST_KEPT * MOST_KEPT; from >= 0; from -= MOST_KEPT) {
      if (from != part.begin) apart<&RowGroup::load>(from);
      apart<step>(args...);
    }
  }
  // Of MANY: in line wherever it is taken, a step would take the compiler a minute.
  template <auto step, class... Args> __attribute__((noinline)) void apart(Args... args) { (this->*step)(args...); }
  INLINE bool has_entropy() const { return MANY && of->g_entropy; }
  static INLINE bool wants_stats(const Call& call) { return MANY ? call.wants_stats : !!call.stats; }  // a flag: 3 %
  INLINE int64_t start_of_chunk() const { return MANY ? part.begin : 0; }
  INLINE int64_t count() const { return MANY ? part.end - part.begin : of->C; }

  INLINE void load(int64_t from) {
    const Call& call = *of;
    const Options o = call.options;
    part.begin = from, part.end = from + MOST_KEPT < call.C ? from + MOST_KEPT : call.C;
    Pair<V> m = this->m;
    V *const z = this->z, *const dz_dx = this->dz_dx(), *const low = this->low();
    const bool capped = F::CHANGED && o.softcap > 0 && call.grad.data;
    // q comes later.
    StridedRows<F>(call, call.input, part).read(reinterpret_cast<T*>(q()), [&](int64_t c, V x_c) LAMBDA {
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
    if constexpr (F::DENSE) load_q<F>(q(), call, part);
  }

  static INLINE auto exceeds(const Pair<V>& a, const Pair<V>& b) {
    return (a.high > b.high) | ((a.high == b.high) & (a.low > b.low));
  }
  INLINE Pair<V> z_of(int64_t i) const { return {z[i], F::CHANGED ? low()[i] : V{}}; }
  // Of equals the first; a NaN counts as largest, as in torch. The chunks come last first; m is made as they are read.
  INLINE void find_largest(bool wanted, Pair<V>* best) {
    if (!wanted) return;
    I at = {};
    Pair<V> most = z_of(0);
    for (int64_t i = 1; i < count(); i++) {
      const Pair<V> z_c = z_of(i);
      const auto larger = exceeds(z_c, most) | ((z_c.high != z_c.high) & (most.high == most.high));
      most.high = larger ? z_c.high : most.high;
      most.low = larger ? z_c.low : most.low;
      at = larger ? I{} + Index(i) : at;
    }
    const auto takes = start_of_chunk() + count() == of->C ? I{} - 1 : ~exceeds(*best, most) | (most.high != most.high);
    best->high = takes ? most.high : best->high;
    best->low = takes ? most.low : best->low;
    largest = takes ? at + Index(start_of_chunk()) : largest;
  }

  // Adds the chunk's classes to the sums. What is left out under probabilities is a largest class, the first there is.
  INLINE void add_chunk(bool wants_stats) {
    const bool probs = F::DENSE && of->probs;
    const Pair<V> m = this->m;
    const MinusLanes<A> minus_m = this->minus_m;
    const int64_t count = this->count();
    V *const q = this->q(), *const e = this->e();
    I y = labels.y - Index(start_of_chunk()), finds_y = this->finds_y;
    V so = {}, q_y = {}, q_others = {}, q_drop = {}, e_drop = {}, lost[4] = {};
    Pair<V> z_y = {};
    if constexpr (MANY) {
      so = sums.so, q_y = sums.q_y, q_others = sums.q_others, q_drop = sums.q_drop, e_drop = sums.e_drop;
      z_y = this->z_y;
      for (int i = 0; i < 4; i++) lost[i] = this->lost[i];
    }
    for (int64_t from = 0; from < count; from += 2 * RUN) {
      const int64_t to = from + 2 * RUN < count ? from + 2 * RUN : count;
      LaneSums<F> part;
      const auto take = [&](int64_t i, int turn) LAMBDA {
        const Pair<V> z_c = z_of(i);
        auto is_y = y == Index(i);
        if (probs) {
          is_y = (z_c.high == m.high) & (z_c.low == m.low) & (finds_y != 0);
          finds_y = is_y ? I{} : finds_y;
          y = is_y ? I{} + Index(i) : y;
        }
        const V e_c = minus_m.exp(z_c, F::CHANGED);
        z_y.high = is_y ? z_c.high : z_y.high;
        if constexpr (F::CHANGED) z_y.low = is_y ? z_c.low : z_y.low;
        V q_c = {};
        if constexpr (F::DENSE) {
          q_y = is_y ? q[i] : q_y;
          q_c = is_y ? V{} : q[i];
        }
        row_lse<F>(
            part, is_y ? V{} : e_c, q_c, [&]() LAMBDA { return is_y ? V{} : -minus<F>(z_c, m); }, turn, wants_stats);
        if constexpr (!MANY) e[i] = e_c;
      };
      int64_t i = from;
      for (; i + 2 <= to; i += 2) take(i, 0), take(i + 1, 1);
      if (i < to) take(i, 0);
      const V run = part.so[0] + part.so[1];
      if (!MANY && from == 0) {  // few classes have no more than this
        so = run, q_others = part.q_others, q_drop = part.q_drop, e_drop = part.e_drop;
        continue;
      }
      add(so, lost[0], run);
      if constexpr (F::DENSE) add(q_others, lost[1], part.q_others), add(q_drop, lost[2], part.q_drop);
      if (wants_stats) add(e_drop, lost[3], part.e_drop);
    }
    sums.so = so, this->z_y = z_y;
    if constexpr (F::DENSE) sums.q_y = q_y, sums.q_others = q_others, sums.q_drop = q_drop;
    if (wants_stats) sums.e_drop = e_drop;
    if (probs) this->finds_y = finds_y, labels.y = y + Index(start_of_chunk());
    for (int i = 0; i < (MANY ? 4 : 1); i++) this->lost[i] = lost[i];
  }

  // The loss, and what the gradients need, from the sums.
  INLINE void end_sums(const Call& call) {
    RowSums<V> sums;
    sums.m = sums.q_y = sums.q_others = sums.q_drop = sums.e_drop = V{};
    sums.so = (this->sums.so + lost[0]) * minus_m.unit;
    sums.z_y = minus<F>(z_y, m);
    if constexpr (F::DENSE)
      sums.q_y = this->sums.q_y, sums.q_others = this->sums.q_others, sums.q_drop = this->sums.q_drop;
    // Class indices have a share of q of their own, beside the spread part.
    if (call.weight && !call.probs)
      sums.q_y += A(1 - call.options.label_smoothing) * gather(static_cast<const A*>(call.weight), labels.y);
    else sums.q_y += own_q<A>(call, 0);
    if (wants_stats(call)) sums.e_drop = this->sums.e_drop * minus_m.unit;
    const RowTerms<V, A> row(sums, m.high + m.low, F::DENSE && call.probs);
    if (call.loss) {
      const V loss = labels.counted ? row_loss(row, call) : V{};
      if (call.rounds_loss) store_first(static_cast<T*>(call.loss) + part.first, loss, part.n);
      else store_first(static_cast<A*>(call.loss) + part.first, loss, part.n);
    }
    if (call.stats) write_stats(row);
    if (call.saved && call.loss) save(sums);
    if (!call.grad.data && !call.d_target.data) return;
    V of_lse = {}, of_entropy = {};
    if (call.g_lse) of_lse = load_first(static_cast<const A*>(call.g_lse) + part.first, part.n);
    if (has_entropy()) of_entropy = load_first(static_cast<const A*>(call.g_entropy) + part.first, part.n);
    const GradFactors<V, A> factors(row, call, scales.scale, of_lse, has_entropy(), of_entropy);
    const bool capped = F::CHANGED && call.options.softcap > 0;
    const V k = capped ? splat(A(1)) : splat(A(call.options.logit_scale));
    p_scale = k * factors.p_scale * minus_m.unit, scale = k * factors.scale, dz_y = k * factors.dz_y;
    lse_m = row.lse_m, h_scale = has_entropy() ? k * factors.h_scale * minus_m.unit : V{};
  }

  INLINE void write_grad() {
    const bool capped = F::CHANGED && of->options.softcap > 0;
    const V p_scale = this->p_scale, scale = this->scale, dz_y = this->dz_y, h_scale = this->h_scale;
    const Pair<V> m = this->m;
    const V *const q = this->q(), *const e = this->e();
    const MinusLanes<A> minus_m = this->minus_m;
    const I y = labels.y - Index(start_of_chunk()), counted = labels.counted;
    StridedRows<F>(*of, of->grad, part)
        .write(reinterpret_cast<T*>(this->q()), [&](int64_t i) LAMBDA {  // never ahead of q
          V e_c = MANY ? minus_m.exp(z_of(i), F::CHANGED) : e[i], q_c = {};
          if constexpr (F::DENSE) q_c = q[i];
          V dx_c = row_grad<F>(
              e_c, q_c, p_scale, scale, h_scale, has_entropy(), [&]() LAMBDA { return -minus<F>(z_of(i), m); }, false,
              [] { return V{}; });
          dx_c = y == Index(i) ? dz_y : dx_c;
          if (capped) dx_c *= dz_dx()[i];
          return counted ? dx_c : V{};
        });
  }

  INLINE void write_target_grad() {
    const A* w = static_cast<const A*>(of->weight);
    const V share = scales.scale * A(1 - of->options.label_smoothing), lse_m = this->lse_m;
    const Pair<V> m = this->m;
    // Into q, which is not needed any more.
    write_probs_grad<F>(q(), *of, part, [&](int64_t i) LAMBDA {
      return target_grad(-minus<F>(z_of(i), m), lse_m, w ? share * w[start_of_chunk() + i] : share);
    });
  }

  INLINE void write_grads() {
    if (of->grad.data) write_grad();
    if (of->d_target.data) write_target_grad();
  }

  // Another layout's backward may read them: logits that went through a saved-tensor hook come back contiguous.
  INLINE void save(const RowSums<V>& sums) const {
    A high[F::lanes], low[F::lanes], so[F::lanes], q_others[F::lanes];
    Index y[F::lanes];
    store(high, m.high), store(low, m.low), store(so, sums.so), store(q_others, sums.q_others), write(y, labels.y);
    for (int i = 0; i < part.n; i++) {
      const int64_t row = part.first + i;
      of->column(SAVED_M)[row] = double(high[i]) + double(low[i]);
      of->column(SAVED_SO)[row] = so[i], of->column(SAVED_Q_OTHERS)[row] = q_others[i];
      if (of->probs) of->column(SAVED_Y)[row] = double(y[i]);
      if (of->wants_stats) of->e_drop_column()[row] = double(sums.e_drop[i]);
    }
  }

  INLINE void write_stats(const RowTerms<V, A>& row) const {
    A entropy[F::lanes], high[F::lanes], low[F::lanes], lse_m[F::lanes];
    Index counted[F::lanes], argmax[F::lanes];
    store(entropy, row_entropy(row)), store(high, m.high), store(low, m.low), store(lse_m, row.lse_m);
    write(counted, labels.counted), write(argmax, largest);
    for (int i = 0; i < part.n; i++)
      of->stats[part.first + i] = counted[i] ? row_stats(double(high[i]) + (double(low[i]) + double(lse_m[i])),
                                                         double(entropy[i]), of->options.lse_square_scale, argmax[i])
                                             : Stats{0, 0, 0, -1};
  }
};

// Each step is taken for several groups before the next one: a step waits for the one before it, and a processor looks
// ahead some hundred instructions, which are one group's. Backward makes the sums again rather than read them: that
// costs less than their memory, for they come with the exponentials.
template <class F, bool MANY> void across_rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  TYPES(F);
  const Scales<F> of_call = Scales<F>::of_call(call);
  typedef RowGroup<F, MANY> Group;
  const int64_t room = across_rooms(call) * across_room(call);
  const int most = MANY ? 1 : across_groups(call);
  Group groups[MANY ? 1 : MOST_GROUPS];
  Part part;
  call.dims.find(begin, part.place);
  for (part.first = begin; part.first < end;) {
    int count = 0;
    for (; count < most && part.first < end; count++) {
      part.n = end - part.first < F::lanes ? int(end - part.first) : F::lanes;
      groups[count].scales = call.upstream ? Scales<F>::of_rows(call, part.first, part.n) : of_call;
      groups[count].start(call, part, static_cast<V*>(scratch) + count * room);
      call.dims.advance(part.place, part.first, F::lanes);
      part.first += F::lanes;
    }
    for (int g = 0; g < count; g++) {
      Pair<V> best = {};
      groups[g].template for_each_chunk<&Group::find_largest>(!!call.stats, &best);
      groups[g].minus_m = MinusLanes<A>(groups[g].m, groups[g].scales.powers);
      groups[g].template for_each_chunk<&Group::add_chunk>(groups[g].wants_stats(call));
    }
    for (int g = 0; g < count; g++) groups[g].end_sums(call);
    if (!call.grad.data && !call.d_target.data) continue;
    for (int g = 0; g < count; g++) groups[g].template for_each_chunk<&Group::write_grads>();
  }
}
