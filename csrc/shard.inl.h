// A shard of the classes of rows in lanes: its sums, and its gradient from the sums of whole rows. What a row's factors
// are made from is a few numbers in double: they take the functions that along.inl.h takes.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

// Counted from the shard's first class; -1 of another shard, asked before a label is cut to an index of fewer bits.
template <class F> INLINE Labels<F> shard_labels(const Call& call, const Part& part) {
  Labels<F> labels;
  for (int i = 0; i < part.n; i++) {
    const int64_t label = call.target_at(call.dims.offset(call.target, part.first + i)), y = label - call.first;
    labels.counted[i] = label == call.options.ignore_index ? 0 : -1;
    labels.y[i] = labels.counted[i] == 0 ? 0 : y >= 0 && y < call.C ? y : -1;
  }
  return labels;
}

template <class F> INLINE void part_sums(RowGroup<F, true>& group, const Call& call) {
  TYPES(F);
  const bool wants_stats = call.wants_stats;
  Pair<V> largest = {};
  group.template for_each_chunk<&RowGroup<F, true>::find_largest>(wants_stats, &largest);
  const Pair<V> m = wants_stats ? largest : group.m;  // NaN where a class is
  group.m.high = finite(group.m.high);
  group.minus_m = MinusLanes<A>(group.m, group.scales.powers);
  group.template for_each_chunk<&RowGroup<F, true>::add_chunk>(wants_stats);
  const V so = (group.sums.so + group.lost[0]) * group.minus_m.unit;
  for (int i = 0; i < group.part.n; i++) {
    const int64_t row = group.part.first + i, y = group.labels.y[i];
    RowSums<double> sums = {0, 0, 0, 0, 0, 0, 0, -1};
    if (group.labels.counted[i]) {
      sums.m = double(m.high[i]) + double(m.low[i]), sums.so = double(so[i]);
      sums.z_y = -infinity_of(0.0);
      if (y >= 0) {
        sums.z_y = double(group.z_y.high[i]) + (F::CHANGED ? double(group.z_y.low[i]) : 0.0);
        sums.q_y = double(own_q<A>(call, y)) + (F::DENSE ? double(group.sums.q_y[i]) : 0.0);
      }
      if constexpr (F::DENSE)
        sums.q_others = double(group.sums.q_others[i]), sums.q_drop = double(group.sums.q_drop[i]);
      if (wants_stats) {
        sums.e_drop = double(group.sums.e_drop[i]) * double(group.minus_m.unit[i]);
        sums.argmax = double(call.first + group.largest[i]);
      }
    }
    store_sums(call, row, sums);
  }
}

template <class F> INLINE void finish_grad(RowGroup<F, true>& group, const Call& call) {
  TYPES(F);
  const A *const upstream = static_cast<const A*>(call.upstream), *const g_lse = static_cast<const A*>(call.g_lse),
                 *const g_entropy = static_cast<const A*>(call.g_entropy);
  const double k = F::CHANGED && call.options.softcap > 0 ? 1 : call.options.logit_scale;
  V p_scale = {}, h_scale = {}, largest = {};
  group.m = {V{}, V{}}, group.scale = group.dz_y = V{};
  for (int i = 0; i < group.part.n; i++) {
    const int64_t row = group.part.first + i;
    RowSums<double> sums = load_sums(call, row);
    if (group.labels.y[i] < 0) sums = put_back(sums);
    const RowTerms<double, double> terms(sums);
    const double scale = call.scale * (upstream ? double(upstream[row]) : 1.0);
    const GradFactors<double, double> factors(terms, call, scale, g_lse ? double(g_lse[row]) : 0.0, g_entropy,
                                              g_entropy ? double(g_entropy[row]) : 0.0);
    group.m.high[i] = A(sums.m), group.m.low[i] = A(sums.m - double(A(sums.m)));
    p_scale[i] = A(k * factors.p_scale), h_scale[i] = A(k * factors.h_scale), largest[i] = A(k * factors.largest());
    group.scale[i] = A(k * factors.scale), group.dz_y[i] = A(k * factors.dz_y);
  }
  group.minus_m = MinusLanes<A>(group.m, headroom_of<A>(largest));
  group.p_scale = p_scale * group.minus_m.unit, group.h_scale = h_scale * group.minus_m.unit;
  group.template for_each_chunk<&RowGroup<F, true>::write_grads>();
}

// As if there were MANY classes, few or many: rows of few are not sharded often enough for code of their own.
template <class F> void across_shard(const Call& call, int64_t begin, int64_t end, void* scratch) {
  TYPES(F);
  RowGroup<F, true> group;
  group.scales = Scales<F>::of_call(call);
  Part part;
  call.dims.find(begin, part.place);
  for (part.first = begin; part.first < end; part.first += F::lanes) {
    part.n = end - part.first < F::lanes ? int(end - part.first) : F::lanes;
    group.start(call, part, static_cast<V*>(scratch));
    group.labels = shard_labels<F>(call, part);
    if (call.is_part()) part_sums(group, call);
    else finish_grad(group, call);
    call.dims.advance(part.place, part.first, F::lanes);
  }
}
