// Plain data that crosses from the bindings to the kernels: pointers, sizes, strides, options. No torch.
#pragma once
#include <cstdint>

namespace fused_ce {

// Always inlined: a copy compiled for one instruction set must not be the one that the linker keeps for all.
#define FUSED_CE_INLINE inline __attribute__((always_inline))

enum class DType : int { float32, float64, bfloat16, float16, int64, uint8 };
enum class Reduction : int { none, mean, sum };

constexpr int MAX_DIMS = 8;

// Up to this many classes a row's vectors are so few that lanes across rows win.
constexpr int64_t FEW_CLASSES = 384;

// Classes whose exponentials a thread keeps from the sums to the gradient; of longer rows the logits are read again.
constexpr int64_t MOST_KEPT = 1 << 16;   // rows in lanes
constexpr int64_t MOST_ALONG = 1 << 20;  // classes in lanes

// Field order as in options.py; the letters are those of formula.py.
struct Options {
  int64_t ignore_index;
  double label_smoothing;   // e; 0: none
  double logit_scale;       // k
  double softcap;           // s; 0: none
  double lse_square_scale;  // L
};

// A tensor of one element, or one row of classes, for each row of the loss. Strides count elements.
struct View {
  void* data;
  DType dtype;
  int64_t class_stride;
  int64_t strides[MAX_DIMS];
};

// Where a row stands in (N, d1..dk). Found once for all tensors: it takes divisions.
struct Place { int64_t at[MAX_DIMS]; };

// Row r of the loss is the r-th of (N, d1..dk) in order.
struct RowDims {
  int rank;
  int64_t sizes[MAX_DIMS];

  FUSED_CE_INLINE void find(int64_t row, Place& place) const {
    for (int d = rank - 1; d > 0; d--) {
      place.at[d] = row % sizes[d];
      row /= sizes[d];
    }
    place.at[0] = row;
    if (rank == 1) place.at[1] = 0;  // which is copied all the same
  }
  FUSED_CE_INLINE int64_t offset(const View& view, const Place& place) const {
    int64_t result = place.at[0] * view.strides[0];
    if (rank > 1) result += place.at[1] * view.strides[1];  // mostly there are no more
    for (int d = 2; d < rank; d++) result += place.at[d] * view.strides[d];
    return result;
  }
  FUSED_CE_INLINE int64_t offset(const View& view, int64_t row) const {
    Place place;
    find(row, place);
    return offset(view, place);
  }
  // From the place of `row` to that of the row `by` after it.
  FUSED_CE_INLINE void advance(Place& place, int64_t row, int64_t by) const {
    const int last = rank - 1;
    place.at[last] += by;
    if (last > 0 && place.at[last] >= sizes[last]) find(row + by, place);
  }
  // Whether n rows from here on are evenly spaced, by the last stride.
  FUSED_CE_INLINE bool in_line(const Place& place, int64_t n) const {
    return rank == 1 || place.at[rank - 1] + n <= sizes[rank - 1];
  }
};

// What stands between forward and backward for each row: some of its sums, by the letters of formula.py, a column each.
// Rows of few classes have none: they are in lanes whatever their layout, where backward makes the sums again for less.
enum SavedColumn {
  SAVED_M,
  SAVED_SO,
  SAVED_Q_OTHERS,
  SAVED_Y,  // under probability targets: the largest logit
  // e_drop comes last, where statistics were asked for.
};

// What a row can tell besides its loss.
struct Stats {
  double lse, z_loss, entropy;
  int64_t argmax;
};

// `acc` is double for float64 logits, float for all others. A null pointer: not given, not wanted.
struct Call {
  // inputs
  View input;             // (N, C, d1..dk)
  View target;            // (N, d1..dk) int64 or uint8; or probabilities (N, C, d1..dk)
  const void* weight;     // (C) acc, those of the classes that input holds
  const void* upstream;   // (rows) acc, of the loss
  const void* g_lse;      // (rows) acc, of lse
  const void* g_entropy;  // (rows) acc, of the entropy
  // outputs
  void* loss;     // (rows) acc, or input's dtype if `rounds_loss`; null: backward
  double* saved;  // (columns, rows)
  Stats* stats;   // (rows)
  double* sums;   // (8, rows), contract.RowSums: of a shard without grad written, of whole rows with grad read
  View grad;      // (N, C, d1..dk), input's dtype
  View d_target;  // (N, C, d1..dk), target's dtype
  // sizes
  RowDims dims;
  int64_t rows, C;
  int64_t first, total;  // classes before those that input holds, and in all
  bool probs;            // target holds probabilities
  bool across;           // the lanes of a vector are rows, not classes
  bool streams;          // grad is written past the caches
  bool rounds_loss;
  bool wants_stats;  // in `stats`, or their part of `sums`; in backward, what the entropy's gradient takes
  // options
  Options options;
  double scale;  // multiplies every row's upstream gradient: 1 / D under a mean
  double ratio;  // D / count under a mean, because the z-loss is divided by the count instead

  FUSED_CE_INLINE bool is_part() const { return sums && !grad.data; }

  FUSED_CE_INLINE double* column(int which) const { return saved + which * rows; }
  FUSED_CE_INLINE double* e_drop_column() const { return column(SAVED_Y + probs); }

  FUSED_CE_INLINE int64_t target_at(int64_t offset) const {
    return target.dtype == DType::uint8 ? static_cast<const uint8_t*>(target.data)[offset]
                                        : static_cast<const int64_t*>(target.data)[offset];
  }
};

// The threads that share a row. All of them call a RowsFunction with the same rows and the same scratch.
struct Barrier;
struct Team {
  int rank, size;
  Barrier* barrier;
  void wait() const;  // until all of them are here
};

// Rows [begin, end) of a call, on the calling thread. `scratch` holds scratch_bytes(call), aligned to 64 bytes.
using RowsFunction = void (*)(const Call& call, int64_t begin, int64_t end, void* scratch, const Team& team);

// A `RowSums<double>` as 8 numbers joined with that of the part after it; for the tests of formula.inl.h.
using CombineFunction = void (*)(double* sums, const double* after, bool probs);

// Groups of rows in lanes that are worked on at a time: as many as keep their logits in the L1 cache.
constexpr int MOST_GROUPS = 8;
FUSED_CE_INLINE int across_groups(const Call& call) { return call.C <= 16 ? MOST_GROUPS : call.C <= 64 ? 2 : 1; }
// A group's scratch: so many rooms, each of so many vectors.
FUSED_CE_INLINE int64_t across_room(const Call& call) { return call.C < MOST_KEPT ? call.C : MOST_KEPT; }
FUSED_CE_INLINE int across_rooms(const Call& call) { return call.d_target.data ? 5 : 4; }

// Whether lanes are rows: a question of shape and strides alone, so that a row's bits do not depend on what is asked.
bool lanes_across_rows(const Call& call);

// Of `Call::saved`.
int saved_columns(int64_t classes, bool probs, bool wants_stats);

struct Refusal {  // why a call was refused: an index outside [0, total)
  bool bad;
  int64_t target;
};

// The whole loss: checks the targets, runs the rows on `threads` threads, reduces. `call.loss` is this function's
// own scratch; the result goes to `loss`, (rows) or one number of `loss_dtype`. Nothing is written when it refuses.
Refusal forward(Call call, Reduction reduction, double num_items, void* loss, DType loss_dtype, int threads);

// The gradient from what forward left in `call.saved`; `call.scale` is the upstream gradient (times `upstream`).
Refusal backward(Call call, Reduction reduction, double num_items, int threads);

// What `call.sums` asks for. The upstream gradients are those of the rows, divided already; options' z-loss is 0.
Refusal of_shard(const Call& call, int threads);

}  // namespace fused_ce
