// Rows of many classes: the lanes of a vector are classes, and a row is taken in blocks that stay in the L1 cache. No
// block waits for another, and a row's bits are the same however many threads share it.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

// Vectors summed in acc before they join a total that keeps what is rounded off: a long run of equal terms would be
// rounded the same way every time.
constexpr int64_t RUN = 8;

// One row of a call.
template <class F> struct AlongRow {
  Classes<typename F::T> x, dx;  // dx.p null: no gradient is wanted
  int64_t t_offset, dt_offset;
  int64_t y;          // outside [0, C): of another shard
  typename F::V x_y;  // in lane 0
  double z_y, q_y;
};

// What one block leaves: its sums, and what its kept exponentials are relative to.
struct BlockSums {
  RowSums<double> sums;
  double shift;
};

// Calls work with what makes exp(z - m): of x itself, where z is x times a number and m is small, or else of z.
template <class F, class Work> INLINE auto with_shifted(double m, int headroom, const Options& o, Work work) {
  typedef typename F::A A;
  if constexpr (F::CHANGED && HAS_FMS)
    if (!(o.softcap > 0) && ShiftedPower<A>::takes(m, o.logit_scale))
      return work(ShiftedPower<A>(m, headroom, o.logit_scale));
  return work(Shifted<A>(m, headroom));
}
template <class F, class V, class Any> INLINE V exp_shifted(const Any& shifted, V x, const Pair<V>& z) {
  if constexpr (F::CHANGED && Any::OF_Z) return shifted.exp(z);
  else return shifted.exp(x);
}

// The sums of the classes [begin, end); KEEP: their exponentials too.
template <class F, bool KEEP>
BlockSums block_sums(typename F::A* kept, const AlongRow<F>& row, const Call& call, int64_t begin, int64_t end) {
  TYPES(F);
  const Options o = call.options;
  const bool wants_stats = call.wants_stats;
  T room[BLOCK];
  const T* const x = row.x.block(room, begin, end);
  const T* const next = row.x.p + (begin + BLOCK) * row.x.stride;
  const int64_t y = row.y - begin;
  const double m = transform_ordered<F>(block_largest<F>(x, end - begin, o, nullptr), o), top = finite(m);
  const Pair<V> of_top = {splat(A(top)), splat(A(top - double(A(top))))};
  V total[4] = {}, lost[4] = {};  // of so, q_others, q_drop, e_drop
  A q[F::DENSE ? BLOCK : 1];
  if constexpr (F::DENSE) spread_q(q, call, row.t_offset, begin, end);
  return with_shifted<F>(top, headroom(call.scale), o, [&](auto shifted) LAMBDA -> BlockSums {
    constexpr bool of_z = decltype(shifted)::OF_Z;
    for (int64_t run = 0; run < end - begin; run += 2 * RUN * F::lanes) {
      LaneSums<F> sums;
      const auto take = [&](V x_c, int64_t i, int n, int turn) LAMBDA {
        const int64_t c = run + i;
        __builtin_prefetch(next + c * row.x.stride);  // the next block travels while this one is worked on
        Pair<V> z_c = {};
        if (of_z) z_c = transform<F>(x_c, o);
        else if (F::DENSE || wants_stats) z_c = product(x_c, o.logit_scale);
        V e_c = exp_shifted<F>(shifted, x_c, z_c), q_c = {};
        // Only now: a padding of -inf would be inf of a scale below 0, and -s of a softcap.
        if (n < F::lanes) e_c = keep_first<A>(e_c, n, A(0));
        if constexpr (F::DENSE) q_c = n == F::lanes ? load(q + c) : load_first(q + c, n);
        const bool holds_y = c <= y && y < c + n;
        if (holds_y) {
          q_c = lane_is<I>(y - c) ? V{} : q_c;
          e_c = lane_is<I>(y - c) ? V{} : e_c;
        }
        const auto drop_c = [&]() LAMBDA {
          const V below = keep_first<A>(-minus<F>(z_c, of_top), n, A(0));
          return holds_y ? (lane_is<I>(y - c) ? V{} : below) : below;
        };
        row_lse<F>(sums, e_c, q_c, drop_c, turn, wants_stats);
        if constexpr (KEEP) {
          if (n == F::lanes) store(kept + begin + c, e_c);
          else store_first(kept + begin + c, e_c, n);
        }
      };
      const int64_t left = end - begin - run, most = 2 * RUN * F::lanes;
      for_each_vector<F>(x + run, left < most ? left : most, take);
      add(total[0], lost[0], sums.so[0] + sums.so[1]);
      if constexpr (F::DENSE) add(total[1], lost[1], sums.q_others), add(total[2], lost[2], sums.q_drop);
      if (wants_stats) add(total[3], lost[3], sums.e_drop);
    }
    const bool holds_y = 0 <= y && y < end - begin;
    const double shift = m == -infinity_of(m) ? m : shifted.shift, factor = exp_of(shift - top) * shifted.unit;
    return {{m, lane_sum(total[0], lost[0]) * factor, holds_y ? row.z_y : -infinity_of(0.0), holds_y ? row.q_y : 0,
             lane_sum(total[1], lost[1]), lane_sum(total[2], lost[2]), lane_sum(total[3], lost[3]) * factor, -1},
            shift};
  });
}

// The gradient of the classes [begin, end), from what block_sums kept or (KEPT false) from the logits once more.
template <class F, bool KEPT>
void block_grad(const typename F::A* kept, double shift, const AlongRow<F>& row, double m,
                const GradFactors<double, double>& factors, const Call& call, int64_t begin, int64_t end) {
  TYPES(F);
  const Options o = call.options;
  const bool capped = F::CHANGED && o.softcap > 0;
  T room[BLOCK], written[BLOCK];
  // Kept exponentials stand for x, but under a softcap.
  const bool unread = KEPT && !capped && row.x.stride != 1;
  const T* const x = unread ? room : row.x.block(room, begin, end);
  T* const dx = row.dx.stride == 1 ? row.dx.p + begin : written;
  const bool of_entropy = !KEPT && call.g_entropy;  // which takes z, not its exponential alone
  const double k = capped ? 1 : o.logit_scale;      // without a softcap dz/dx is the same number everywhere
  const Pair<V> of_m = {splat(A(m)), splat(A(m - double(A(m))))};
  A q[F::DENSE ? BLOCK : 1];
  if constexpr (F::DENSE) spread_q(q, call, row.t_offset, begin, end);
  const bool streams = call.streams && row.dx.stride == 1;
  const int64_t head = streams ? to_stream(dx, end - begin) : 0;
  const auto write_block = [&](auto shifted) LAMBDA {
    constexpr bool of_z = decltype(shifted)::OF_Z;
    const double unit = k * __builtin_exp((KEPT ? shift : shifted.shift) - m) * shifted.unit;
    const A p_scale = A(factors.p_scale * unit), h_scale = A(factors.h_scale * unit), scale = A(k * factors.scale);
    const auto write = [&](V x_c, int64_t c, int n, int) LAMBDA {
      const bool whole = n == F::lanes;
      V e_c, q_c = {};
      Pair<V> z_c = {};
      if constexpr (KEPT) e_c = whole ? load(kept + begin + c) : load_first(kept + begin + c, n);
      else {
        if (of_z) z_c = transform<F>(x_c, o);
        else if (of_entropy) z_c = product(x_c, o.logit_scale);
        e_c = exp_shifted<F>(shifted, x_c, z_c);
      }
      if constexpr (F::DENSE) q_c = whole ? load(q + c) : load_first(q + c, n);
      const V dx_c = row_grad<F>(
          e_c, q_c, p_scale, scale, h_scale, of_entropy, [&]() LAMBDA { return -minus<F>(z_c, of_m); }, of_z && capped,
          [&]() LAMBDA { return transform_grad<F>(x_c, o); });
      if (whole && streams) stream(dx + c, dx_c);
      else if (whole) store(dx + c, dx_c);
      else store_first(dx + c, dx_c, n);
    };
    if (head) write(load_first(x, head), 0, int(head), 0);
    for_each_vector<F>(x + head, end - begin - head,
                       [&](V x_c, int64_t i, int n, int turn) LAMBDA { write(x_c, head + i, n, turn); });
  };
  if constexpr (KEPT) write_block(Shifted<A>(m, headroom(call.scale)));
  else with_shifted<F>(m, headroom(factors.largest()), o, write_block);
  if (streams) stream_end();
  if (begin <= row.y && row.y < end)
    store_first(dx + row.y - begin, A(factors.dz_y) * transform_grad<F>(row.x_y, o), 1);
  if (row.dx.stride != 1) row.dx.scatter(written, begin, end);
}

// d loss / d t_c = (1 - e) w_c (lse - z_c), for probabilities that ask for a gradient.
template <class F>
void block_target_grad(const AlongRow<F>& row, const RowTerms<double, double>& terms, double scale, const Call& call,
                       int64_t begin, int64_t end) {
  TYPES(F);
  const A* w = static_cast<const A*>(call.weight);
  const A share = A(scale * (1 - call.options.label_smoothing)), lse_m = A(terms.lse_m), high = A(terms.sums.m);
  const Pair<V> m = {splat(high), splat(A(terms.sums.m - double(high)))};
  A dt[BLOCK];
  T room[BLOCK];
  for_each_vector<F>(row.x.block(room, begin, end), end - begin, [&](V x_c, int64_t c, int n, int) LAMBDA {
    const Pair<V> z_c = transform<F>(x_c, call.options);
    V result = target_grad(-minus<F>(z_c, m), lse_m, share);
    if (w) result *= n == F::lanes ? load(w + begin + c) : load_first(w + begin + c, n);
    store_first(dt + c, result, n);
  });
  write_elements(call.d_target.data, call.d_target.dtype, row.dt_offset + begin * call.d_target.class_stride,
                 call.d_target.class_stride, dt, end - begin);
}

template <class T> void write_row(const Call& call, int64_t row, double loss, const RowSums<double>& sums, double y) {
  typedef typename Simd<T>::A A;
  if (call.rounds_loss) store_first(static_cast<T*>(call.loss) + row, splat(A(loss)), 1);
  else static_cast<A*>(call.loss)[row] = A(loss);
  if (!call.saved) return;
  call.column(SAVED_M)[row] = sums.m;
  call.column(SAVED_SO)[row] = sums.so;
  call.column(SAVED_Q_OTHERS)[row] = sums.q_others;
  if (call.probs) call.column(SAVED_Y)[row] = y;
  if (call.wants_stats) call.e_drop_column()[row] = sums.e_drop;
}

// Loss and gradient 0 whatever the logits hold: they are not even read.
template <class T> void write_ignored(const Call& call, int64_t row) {
  if (call.loss) write_row<T>(call, row, 0, {}, -1);
  if (call.stats) call.stats[row] = Stats{0, 0, 0, -1};
  if (call.is_part()) store_sums(call, row, {0, 0, 0, 0, 0, 0, 0, -1});
}

// The class y of a row, and what is known of it before the row is read.
template <class F> INLINE void load_y(AlongRow<F>& row, const Call& call, int64_t y) {
  TYPES(F);
  row.y = y;
  if (uint64_t(y) >= uint64_t(call.C)) {
    row.x_y = V{}, row.z_y = -infinity_of(0.0), row.q_y = 0;
    return;
  }
  row.x_y = load_first(row.x.p + y * row.x.stride, 1);  // before anyone writes dx, which may be x
  row.z_y = transform<F>(row.x_y, call.options).sum();
  row.q_y = double(own_q<A>(call, y));
  if constexpr (F::DENSE) {
    A spread;
    spread_q(&spread, call, row.t_offset, y, y + 1);
    row.q_y += double(spread);
  }
}

// Each row by the whole team: its members take blocks, and wait for each other where one reads what another wrote.
template <class F> void along_rows(const Call& call, int64_t begin, int64_t end, void* scratch, const Team& team) {
  TYPES(F);
  const A *upstream = static_cast<const A*>(call.upstream), *g_lse = static_cast<const A*>(call.g_lse),
          *g_entropy = static_cast<const A*>(call.g_entropy);
  const int64_t C = call.C, count = (C + BLOCK - 1) / BLOCK;
  A* const spare = static_cast<A*>(scratch);
  const int64_t room = C < MOST_ALONG ? (C + F::lanes - 1) / F::lanes * F::lanes : 0;
  BlockSums* const parts = reinterpret_cast<BlockSums*>(spare + room);
  const bool first = team.rank == 0, makes_sums = call.loss || call.is_part();
  const auto my_blocks = [&](auto work) LAMBDA {
    for (int64_t b = count * team.rank / team.size; b < count * (team.rank + 1) / team.size; b++)
      work(b, b * BLOCK, b * BLOCK + BLOCK < C ? b * BLOCK + BLOCK : C);
  };
  for (int64_t i = begin; i < end; i++) {
    AlongRow<F> row;
    row.x = {static_cast<T*>(call.input.data) + call.dims.offset(call.input, i), call.input.class_stride};
    row.dx = {static_cast<T*>(call.grad.data), call.grad.class_stride};
    if (row.dx.p) row.dx.p += call.dims.offset(call.grad, i);
    row.t_offset = call.probs ? call.dims.offset(call.target, i) : 0;
    row.dt_offset = call.d_target.data ? call.dims.offset(call.d_target, i) : 0;
    const int64_t label = call.probs ? 0 : call.target_at(call.dims.offset(call.target, i));
    if (!call.probs && label == call.options.ignore_index) {
      if (first) write_ignored<T>(call, i);
      if (first && row.dx.p) row.dx.clear(C);
      continue;
    }
    const int64_t top =
        makes_sums && (call.probs || (call.wants_stats && first)) ? largest<F>(row.x, C, call.options) : 0;
    load_y(row, call, !call.probs ? label - call.first : call.loss ? top : int64_t(call.column(SAVED_Y)[i]));
    // Where dx has room for acc and x is not needed again, the exponentials wait in it for their factor.
    const bool in_dx =
        sizeof(T) == sizeof(A) && !(F::CHANGED && call.options.softcap > 0) && row.dx.stride == 1 && !call.streams;
    const bool keep = call.loss && row.dx.p && (in_dx || C < MOST_ALONG);
    A* const kept = in_dx ? reinterpret_cast<A*>(row.dx.p) : spare;
    team.wait();
    if (makes_sums)
      my_blocks([&](int64_t b, int64_t from, int64_t to) LAMBDA {
        parts[b] =
            keep ? block_sums<F, true>(kept, row, call, from, to) : block_sums<F, false>(nullptr, row, call, from, to);
      });
    team.wait();
    RowSums<double> sums = {};
    if (makes_sums) {
      // Every part is brought to the row's m at once: from part to part, each step up would round once more.
      double m = parts[0].sums.m;
      for (int64_t b = 1; b < count; b++) m = parts[b].sums.m > m ? parts[b].sums.m : m;
      sums = rescale(parts[0].sums, m);
      for (int64_t b = 1; b < count; b++) sums = combine(sums, rescale(parts[b].sums, m), false);
    } else if (call.sums) {
      sums = load_sums(call, i);
      if (row.y < 0 || row.y >= C) sums = put_back(sums);
    } else {
      sums.m = call.column(SAVED_M)[i], sums.so = call.column(SAVED_SO)[i];
      if constexpr (F::DENSE) sums.q_others = call.column(SAVED_Q_OTHERS)[i];
      if (call.wants_stats) sums.e_drop = call.e_drop_column()[i];
      sums.z_y = row.z_y, sums.q_y = row.q_y;
    }
    if (call.is_part() && first) {
      sums.e_drop = call.wants_stats ? sums.e_drop : 0, sums.argmax = -1;
      if (call.wants_stats) {
        sums.argmax = double(call.first + top);
        sums.m = transform<F>(load_first(row.x.p + top * row.x.stride, 1), call.options).sum();  // NaN where one is
      }
      store_sums(call, i, sums);
    }
    const RowTerms<double, double> terms(sums);
    if (call.loss && first) write_row<T>(call, i, row_loss(terms, call), sums, double(row.y));
    if (call.stats && first)
      call.stats[i] = row_stats(terms.lse, row_entropy(terms), call.options.lse_square_scale, top);
    const double scale = call.scale * (upstream ? double(upstream[i]) : 1.0);
    const GradFactors<double, double> factors(terms, call, scale, g_lse ? double(g_lse[i]) : 0.0, g_entropy,
                                              g_entropy ? double(g_entropy[i]) : 0.0);
    my_blocks([&](int64_t b, int64_t from, int64_t to) LAMBDA {
      if (call.d_target.data) block_target_grad<F>(row, terms, scale, call, from, to);
      if (!row.dx.p) return;
      if (keep) block_grad<F, true>(kept, parts[b].shift, row, sums.m, factors, call, from, to);
      else block_grad<F, false>(nullptr, 0, row, sums.m, factors, call, from, to);
    });
    team.wait();
  }
}
