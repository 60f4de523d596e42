// A row's classes in blocks that stay in the L1 cache, side by side there wherever they lie.
// Included inside a namespace, once for each instruction set: nothing may be #included here.

constexpr int64_t BLOCK = 2048;  // classes

// The classes of a row: side by side, or `stride` apart.
template <class T> struct Classes {
  T* p;
  int64_t stride;

  // Those of the block [begin, end) side by side, in `room` where they do not lie so.
  INLINE const T* block(T* room, int64_t begin, int64_t end) const {
    if (stride == 1) return p + begin;
    const T* const from = p + begin * stride;
#pragma GCC unroll 8
    for (int64_t i = 0; i < end - begin; i++) room[i] = from[i * stride];
    return room;
  }
  INLINE void clear(int64_t C) const {
    if (stride == 1) __builtin_memset(p, 0, C * sizeof(T));
    else
      for (int64_t c = 0; c < C; c++) p[c * stride] = T{};
  }
  INLINE void scatter(const T* room, int64_t begin, int64_t end) const {
    T* const to = p + begin * stride;
#pragma GCC unroll 8
    for (int64_t i = 0; i < end - begin; i++) to[i * stride] = room[i];
  }
};

// Calls f(x, number in the block, lanes in use, turn) for the vectors of a block of n classes; x past the end holds 0.
// turn alternates, so that callers keep two independent sums.
template <class F, class Function> INLINE void for_each_vector(const typename F::T* x, int64_t n, Function f) {
  TYPES(F);
  const auto whole = [&](int64_t i, int turn) LAMBDA { f(load(x + i), i, F::lanes, turn); };
  int64_t i = 0;
  for (; i + 2 * F::lanes <= n; i += 2 * F::lanes) whole(i, 0), whole(i + F::lanes, 1);
  if (i + F::lanes <= n) whole(i, 0), i += F::lanes;
  if (i < n) f(load_first(x + i, n - i), i, int(n - i), 1);
}

// The largest of a block, in the order of z; where one is NaN, `nan` is.
template <class F>
INLINE typename F::A block_largest(const typename F::T* x, int64_t count, const Options& o, bool* nan) {
  TYPES(F);
  const A lowest = -A(__builtin_inff());
  V most[2] = {splat(lowest), splat(lowest)}, nans = {};  // nans: 0, or a NaN
  for_each_vector<F>(x, count, [&](V x_c, int64_t, int n, int turn) LAMBDA {
    V key = order<F>(x_c, o);
    if (n < F::lanes) key = keep_first<A>(key, n, lowest);
    most[turn] = max(key, most[turn]);
    if (nan) nans = key == key ? nans : key;
  });
  if (nan) {
    const double sum = lane_sum(nans, V{});
    *nan = sum != sum;
  }
  return lane_max<A>(max(most[0], most[1]));
}

// The largest logit, which is left out of the sum when no target is named; a NaN counts as largest, as in torch.
template <class F> int64_t largest(const Classes<typename F::T>& x, int64_t C, const Options& options) {
  TYPES(F);
  T room[BLOCK];
  const Options o = options;
  A best = -A(__builtin_inff());
  bool nan = false;
  int64_t from = 0, y = -1;
  for (int64_t begin = 0; begin < C && !nan; begin += BLOCK) {
    const int64_t end = begin + BLOCK < C ? begin + BLOCK : C;
    const A m = block_largest<F>(x.block(room, begin, end), end - begin, o, &nan);
    if (m > best || nan) best = m, from = begin;
  }
  const int64_t end = from + BLOCK < C ? from + BLOCK : C;
  for_each_vector<F>(x.block(room, from, end), end - from, [&](V x_c, int64_t i, int n, int) LAMBDA {
    const V key = order<F>(x_c, o), hit = (nan ? key != key : key == best) ? splat(A(1)) : V{};
    if (y >= 0 || lane_max<A>(hit) == 0) return;
    for (int j = n - 1; j >= 0; j--) y = hit[j] != 0 ? from + i + j : y;
  });
  return y;
}
