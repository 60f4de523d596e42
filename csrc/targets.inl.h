// The targets of rows side by side in the lanes of vectors: class indices, shares q of the classes, and the gradient of
// probabilities. Included inside a namespace, once for each instruction set: nothing may be #included here.

template <class F> struct Labels {
  typename F::I y = {}, counted = typename F::I{} - 1;  // counted: all bits set in rows that are not ignored
};

// As many labels as lanes, side by side.
template <class F> INLINE Labels<F> narrow_labels(const int64_t* p, int64_t ignored) {
  typedef typename F::I I;
  if constexpr (sizeof(I) / F::lanes == sizeof(int64_t)) {
    const I label = read<I>(p), counts = label != ignored;
    return {label & counts, counts};
  } else {
    constexpr int half = lanes_of<Vec::i64>;
    Vec::f32_half label[2], counts[2];
    for (int i = 0; i < 2; i++) {
      const Vec::i64 wide = read<Vec::i64>(p + i * half), counts_i = wide != ignored;
      label[i] = (Vec::f32_half) __builtin_convertvector(wide & counts_i, Vec::i32_half);
      counts[i] = (Vec::f32_half) __builtin_convertvector(counts_i, Vec::i32_half);
    }
    return {(I)join(label[0], label[1]), (I)join(counts[0], counts[1])};
  }
}

template <class F> INLINE Labels<F> load_labels(const Call& call, const Part& part) {
  TYPES(F);
  typedef decltype(I{}[0] + 0) Index;
  const View& target = call.target;
  const int64_t ignored = call.options.ignore_index;
  if (target.dtype == DType::int64 && part.n == F::lanes && call.dims.in_line(part.place, part.n) &&
      target.strides[call.dims.rank - 1] == 1)
    return narrow_labels<F>(static_cast<const int64_t*>(target.data) + call.dims.offset(target, part.place), ignored);
  Index labels[F::lanes] = {}, counts[F::lanes] = {};
  for (int i = 0; i < part.n; i++) {
    const int64_t label = call.target_at(call.dims.offset(target, part.first + i));
    counts[i] = label == ignored ? 0 : -1;
    labels[i] = Index(label) & counts[i];
  }
  return {read<I>(labels), read<I>(counts)};
}

// f(T{}) for probabilities that a vector of logits' lanes can hold, f(nullptr) for others.
template <class F, class Function> INLINE void by_lanes(DType dtype, Function f) {
  TYPES(F);
  const DType own = sizeof(T) == 8           ? DType::float64
                    : __is_same(T, float)    ? DType::float32
                    : __is_same(T, bfloat16) ? DType::bfloat16
                                             : DType::float16;
  if (dtype == own) return f(T{});
  if constexpr (sizeof(T) == 2)
    if (dtype == DType::float32) return f(A{});
  f(nullptr);
}

// The spread part of q (see spread_q), (end - begin) vectors.
template <class F> INLINE void load_q(typename F::V* q, const Call& call, const Part& part) {
  TYPES(F);
  const A* const w = static_cast<const A*>(call.weight);
  const double e = call.options.label_smoothing;
  const V u = splat(A(e / double(call.total)));
  const A share = A(1 - e);
  const auto set = [&](int64_t c, V q_c) LAMBDA { q[c] = w ? q_c * w[part.begin + c] : q_c; };
  if (!call.probs) {
    for (int64_t c = 0; c < part.end - part.begin; c++) set(c, u);
    return;
  }
  by_lanes<F>(call.target.dtype, [&](auto element) LAMBDA {
    typedef decltype(element) P;
    if constexpr (!__is_same(P, decltype(nullptr))) {
      StridedRows<F, P>(call, call.target, part).read(reinterpret_cast<P*>(q), [&](int64_t c, V t_c) LAMBDA {
        set(c, u + share * t_c);
      });
    } else {
      A block[BLOCK];
      for (int i = 0; i < part.n; i++) {
        const int64_t offset = call.dims.offset(call.target, part.first + i);
        for (int64_t from = part.begin; from < part.end; from += BLOCK) {
          const int64_t to = from + BLOCK < part.end ? from + BLOCK : part.end;
          spread_q(block, call, offset, from, to);
          for (int64_t c = from; c < to; c++) q[c - part.begin][i] = block[c - from];
        }
      }
    }
  });
}

// f(c): the gradient of the probability of class begin + c. `spare` has room for a vector a class.
template <class F, class Function>
INLINE void write_probs_grad(typename F::V* spare, const Call& call, const Part& part, Function f) {
  TYPES(F);
  by_lanes<F>(call.d_target.dtype, [&](auto element) LAMBDA {
    typedef decltype(element) P;
    if constexpr (!__is_same(P, decltype(nullptr))) {
      StridedRows<F, P>(call, call.d_target, part).write(reinterpret_cast<P*>(spare), f);
    } else {
      A block[BLOCK];
      for (int64_t c = 0; c < part.end - part.begin; c++) spare[c] = f(c);
      for (int i = 0; i < part.n; i++) {
        const int64_t offset = call.dims.offset(call.d_target, part.first + i);
        for (int64_t from = part.begin; from < part.end; from += BLOCK) {
          const int64_t to = from + BLOCK < part.end ? from + BLOCK : part.end;
          for (int64_t c = from; c < to; c++) block[c - from] = spare[c - part.begin][i];
          write_elements(call.d_target.data, call.d_target.dtype, offset + from * call.d_target.class_stride,
                         call.d_target.class_stride, block, to - from);
        }
      }
    }
  });
}
