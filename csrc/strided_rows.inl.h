// Reads and writes the elements of rows side by side, whatever the strides: (N, C, d1..dk), transposed logits, few
// classes. Included inside a namespace, once for each instruction set: nothing may be #included here.

// The classes [begin, end) of a group of rows.
struct Part {
  int64_t first;  // the row of lane 0
  Place place;    // where it stands
  int n;          // rows in use
  int64_t begin, end;
};

// A tensor's elements for them, class by class: a row to each lane.
template <class F, class T = typename F::T> struct StridedRows {
  typedef typename F::V V;
  static_assert(sizeof(typename Simd<T>::V) == sizeof(V) && Constants<typename Simd<T>::A>::lanes == F::lanes);
  const Call& call;
  const View& view;
  const int64_t first, begin, C;  // C: of the classes from begin on
  const int n;
  T* const start;  // class `begin` of row `first`
  const int64_t row_stride;
  const bool in_line;
  enum { SIDE_BY_SIDE, ROW_BY_ROW, ONE_BY_ONE } way;  // rows or classes side by side in memory, or neither

  INLINE StridedRows(const Call& call, const View& view, const Part& part)
      : call(call),
        view(view),
        first(part.first),
        begin(part.begin),
        C(part.end - part.begin),
        n(part.n),
        start(static_cast<T*>(view.data) + call.dims.offset(view, part.place) + begin * view.class_stride),
        row_stride(view.strides[call.dims.rank - 1]),
        in_line(call.dims.in_line(part.place, n)) {
    if (!in_line) way = ONE_BY_ONE;
    else if (row_stride == 1) way = SIDE_BY_SIDE;
    else way = view.class_stride == 1 ? ROW_BY_ROW : ONE_BY_ONE;
  }

  // f(c, class c of all rows). `raw` has room for (C, lanes) elements; f may write there, a whole vector for each c.
  template <class Function> INLINE void read(T* raw, Function f) const {
    if (way == SIDE_BY_SIDE && n == F::lanes) {
      for (int64_t c = 0; c < C; c++) f(c, load(start + c * view.class_stride));
    } else if (way == SIDE_BY_SIDE) {
      for (int64_t c = 0; c < C; c++) f(c, load_first(start + c * view.class_stride, n));
    } else if (way == ROW_BY_ROW) {
      for (int64_t c = 0; c < C; c += F::lanes) {
        const int64_t count = C - c < F::lanes ? C - c : F::lanes;
        // A whole vector may be read where what follows the row belongs to the group too.
        const int64_t whole = count == F::lanes ? n : row_stride > 0 ? n - 1 - (F::lanes - count) / row_stride : 0;
        const Tile<V> tile = transpose(read_tile(c, count, whole, InOrder<V>{}));
        for (int64_t j = 0; j < count; j++) f(c + j, tile.v[j]);
      }
    } else {
      // All narrow stores come before the first wide load: a wide load right after them defeats store forwarding.
      each_row([&](int i, T* p) LAMBDA {
#pragma GCC unroll 8
        for (int64_t c = 0; c < C; c++) raw[c * F::lanes + i] = p ? p[c * view.class_stride] : T{};
      });
      for (int64_t c = C - 1; c >= 0; c--) f(c, load(raw + c * F::lanes));
    }
  }
  // f(c): the vector to write for class c.
  template <class Function> INLINE void write(T* raw, Function f) const {
    if (way == SIDE_BY_SIDE && n == F::lanes) {
      for (int64_t c = 0; c < C; c++) store(start + c * view.class_stride, f(c));
    } else if (way == SIDE_BY_SIDE) {
      for (int64_t c = 0; c < C; c++) store_first(start + c * view.class_stride, f(c), n);
    } else if (way == ROW_BY_ROW) {
      // The last classes come first, so that the next row overwrites what they write past the end of a row.
      for (int64_t c = (C - 1) / F::lanes * F::lanes; c >= 0; c -= F::lanes) {
        const int64_t count = C - c < F::lanes ? C - c : F::lanes;
        const int64_t whole = count == F::lanes                ? n
                              : row_stride == C && C == call.C ? n - 1 - (F::lanes - count) / call.C
                                                               : 0;
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
    return i < whole ? load(start + i * row_stride + c) : i < n ? load_first(start + i * row_stride + c, count) : V{};
  }
  template <int... i> INLINE Tile<V> read_tile(int64_t c, int64_t count, int64_t whole, Order<i...>) const {
    return {{read_row(i, c, count, whole)...}};
  }
  template <class Function, int... j> INLINE Tile<V> tile_of(int64_t c, Function f, Order<j...>) const {
    return {{(c + j < C ? f(c + j) : V{})...}};
  }
  INLINE void write_row(int i, V v, int64_t c, int64_t count, int64_t whole) const {
    if (i < whole) store(start + i * row_stride + c, v);
    else if (i < n) store_first(start + i * row_stride + c, v, count);
  }
  template <int... i>
  INLINE void write_tile(const Tile<V>& tile, int64_t c, int64_t count, int64_t whole, Order<i...>) const {
    (write_row(i, tile.v[i], c, count, whole), ...);
  }
  template <class Function> INLINE void each_row(Function f) const {
    T* const data = static_cast<T*>(view.data) + begin * view.class_stride;
    for (int i = 0; i < F::lanes; i++)
      f(i, i >= n ? nullptr : in_line ? start + i * row_stride : data + call.dims.offset(view, first + i));
  }
};
