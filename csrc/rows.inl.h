// Which of the two ways a call goes, along or across, and for what kind of z and q its code was compiled.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

template <class F> void traits_rows(const Call& call, int64_t begin, int64_t end, void* scratch, const Team& team) {
  if (!call.across) along_rows<F>(call, begin, end, scratch, team);
  else if (call.sums) across_shard<F>(call, begin, end, scratch);
  else if (call.C > MOST_KEPT || call.g_entropy)  // so that only MANY has code for it, which would slow others down
    across_rows<F, true>(call, begin, end, scratch);
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
