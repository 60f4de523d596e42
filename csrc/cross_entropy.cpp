// One call around its rows: check the targets, find the divisor, share the rows among threads, reduce.
#include "cross_entropy.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "memory.h"
#include "rounding.h"
#include "scratch.h"

namespace fused_ce {

// Not OpenMP's, which would hold up the other teams too.
struct Barrier { std::atomic<int> arrived{0}, round{0}; };

namespace {

// Below this many bytes of logits a second thread costs more than it saves (docs/decisions.md).
[[maybe_unused]] constexpr int64_t SERIAL_BYTES = 1 << 16;
constexpr int64_t HUGE_PAGE = 1 << 21;
constexpr int64_t KEPT_SCRATCH = 1 << 22;  // bytes of a thread's, between calls

// From this many rows side by side in memory on, lanes across them win, where their classes lie apart.
constexpr int64_t FEW_ROWS = 16;

// A gradient of this size leaves the caches anyway, and a store past them need not read what it overwrites. Not in new
// memory, whose pages the system has just cleared in the caches.
constexpr int64_t STREAMED_BYTES = 1 << 25;

// A forked child inherits the memory of libgomp's thread pool but not its threads: a parallel region would wait for
// them for ever.
bool forked = false;
#ifdef __linux__
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Fresh memory is handed out in 4 KiB pages, each a fault at first touch that costs more than the kernel's work on it.
void advise_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + HUGE_PAGE - 1) & ~uintptr_t(HUGE_PAGE - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) & ~uintptr_t(HUGE_PAGE - 1);
  if (end >= begin + 2 * HUGE_PAGE) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// What a thread needs. Rows in lanes: across_rooms() vectors a class. Classes in lanes: one number a class, where they
// are kept, and what a block of them (at least 1,024) gives.
int64_t scratch_bytes(const Call& call) {
  const int64_t kept = call.across ? across_groups(call) * across_rooms(call) * across_room(call) * WIDEST_VECTOR
                                   : (call.C < MOST_ALONG ? call.C + 16 : 16) * 8 + (call.C / 1024 + 1) * 128;
  return (kept + WIDEST_VECTOR - 1) / WIDEST_VECTOR * WIDEST_VECTOR;
}

thread_local Scratch::Kept kept_for_rows, kept_losses;

void run_rows(const Call& call, int64_t begin, int64_t end, void* scratch) {
  if (begin < end) isa().rows[int(call.input.dtype)](call, begin, end, scratch, {0, 1, nullptr});
}

int64_t bytes_of(const Call& call) { return call.rows * call.C * size_of(call.input.dtype); }

// How many threads are worth waking for this many bytes.
int threads_for([[maybe_unused]] int64_t bytes, [[maybe_unused]] int threads) {
#ifdef _OPENMP
  if (!forked && bytes >= SERIAL_BYTES) return threads;
#endif
  return 1;
}

// f(thread, threads) on each of them; OpenMP may give fewer than were wanted.
template <class Function> void parallel(int threads, Function f) {
  if (threads == 1) return f(0, 1);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num(), omp_get_num_threads());
#endif
}

// As many rows as can be shared evenly go to one thread each; what is left, to teams.
void run_all_rows(const Call& call, int wanted) {
  const int threads = threads_for(bytes_of(call), wanted);
  if (call.grad.data) advise_huge_pages(call.grad.data, bytes_of(call));
  const bool may_team = !call.across && call.C * size_of(call.input.dtype) >= SERIAL_BYTES;
  const int64_t teams = may_team ? call.rows % threads : 0, bytes = scratch_bytes(call);
  const std::unique_ptr<Barrier[]> barriers(teams ? new Barrier[teams] : nullptr);
  const Scratch scratch(kept_for_rows, threads * bytes, threads * KEPT_SCRATCH);
  parallel(threads, [&](int64_t t, int64_t T) {
    if (T != threads) return run_rows(call, call.rows * t / T, call.rows * (t + 1) / T, scratch.data + t * bytes);
    const int64_t alone = call.rows - teams;
    run_rows(call, alone * t / T, alone * (t + 1) / T, scratch.data + t * bytes);
    if (!teams) return;
    const int64_t team = t * teams / T, begin = (team * T + teams - 1) / teams,
                  end = ((team + 1) * T + teams - 1) / teams;
    void* const of_team = scratch.data + begin * bytes;  // of its first member, who is alone no more
    isa().rows[int(call.input.dtype)](call, alone + team, alone + team + 1, of_team,
                                      {int(t - begin), int(end - begin), &barriers[team]});
  });
}

// What is found out about GROUP rows at a time, so that the order of additions depends on the number of rows alone.
constexpr int64_t GROUP = 4096;
template <class Result, class Function> std::vector<Result> by_groups(int64_t rows, int threads, Function f) {
  const int64_t groups = (rows + GROUP - 1) / GROUP;
  std::vector<Result> results(groups);
  parallel(threads, [&](int t, int T) {
    for (int64_t g = groups * t / T; g < groups * (t + 1) / T; g++)
      results[g] = f(g * GROUP, g * GROUP + GROUP < rows ? g * GROUP + GROUP : rows);
  });
  return results;
}

struct Tally {
  int64_t count;   // rows that are not ignored
  double weights;  // their sum of w_y
  Refusal refusal;
};

// One target at a time, by `label(i)`; `weighs`: the weights are wanted too.
template <class Label> Tally tally(const Call& call, bool weighs, int64_t begin, int64_t end, Label label) {
  const int64_t ignored = call.options.ignore_index;
  const uint64_t C = uint64_t(call.total);
  if (!weighs && uint64_t(ignored) >= C) {  // fast path: no bad or ignored target
    uint64_t signs = 0;
    for (int64_t i = begin; i < end; i++) signs |= uint64_t(label(i)) | (C - 1 - uint64_t(label(i)));
    if (!(signs >> 63)) return {end - begin, double(end - begin), {false, 0}};
  }
  int64_t count = 0, bad = 0;
  for (int64_t i = begin; i < end; i++) {
    const int64_t y = label(i);
    count += y != ignored;
    bad += (uint64_t(y) >= C) & (y != ignored);
  }
  Tally result{count, double(count), {false, 0}};
  if (bad)
    for (int64_t i = begin; !result.refusal.bad; i++)
      if (uint64_t(label(i)) >= C && label(i) != ignored) result.refusal = {true, label(i)};
  if (!weighs || bad) return result;
  const auto sum = [&](const auto* weight) {
    constexpr int64_t CHAINS = 8;  // of additions that do not wait for each other
    double sums[CHAINS] = {}, total = 0;
    for (int64_t i = begin; i < end; i++)
      if (const int64_t y = label(i); y != ignored) sums[i % CHAINS] += weight[y];
    for (double of_chain : sums) total += of_chain;
    return total;
  };
  result.weights = call.input.dtype == DType::float64 ? sum(static_cast<const double*>(call.weight))
                                                      : sum(static_cast<const float*>(call.weight));
  return result;
}

// Whether the rows of a tensor lie one after the other.
bool is_packed(const View& view, const RowDims& dims) {
  int64_t stride = 1;
  for (int d = dims.rank - 1; d >= 0; stride *= dims.sizes[d--])
    if (view.strides[d] != stride && dims.sizes[d] != 1) return false;
  return true;
}

// Class weights so small or large that float could not hold scale w / D with its parts: only their ratios count under a
// mean, so they are multiplied by a power of two that makes them some 1 on average.
double normalize(Call& call, double weights, int64_t count, std::unique_ptr<float[]>& normal) {
  const double mean = weights / double(count);
  if (!call.weight || call.input.dtype == DType::float64 || !(mean > 0) || (mean > 1e-9 && mean < 1e9) ||
      !(mean < __builtin_inf()))
    return weights;
  const double factor = std::ldexp(1.0, -std::ilogb(mean));
  normal.reset(new float[call.C]);
  for (int64_t c = 0; c < call.C; c++) normal[c] = float(static_cast<const float*>(call.weight)[c] * factor);
  call.weight = normal.get();
  return weights * factor;
}

// Checks every target and finds what the rows share: how they are written, the scale and, under a mean, D / count.
Refusal prepare(Call& call, Reduction reduction, double num_items, int threads, double* divisor,
                std::unique_ptr<float[]>& normal) {
  call.ratio = 1;
  // Longer rows keep their exponentials in the gradient itself.
  call.streams = bytes_of(call) >= STREAMED_BYTES && call.C < MOST_ALONG && memory::is_lent(call.grad.data);
  int64_t count = call.rows;
  double weights = double(count);
  if (!call.probs) {
    const bool weighs = call.weight && reduction == Reduction::mean;
    const int64_t* const packed =  // the usual targets, for a short loop
        call.target.dtype == DType::int64 && is_packed(call.target, call.dims)
            ? static_cast<const int64_t*>(call.target.data)
            : nullptr;
    count = 0, weights = 0;
    for (const Tally& part :
         by_groups<Tally>(call.rows, threads_for(call.rows * 8, threads), [&](int64_t begin, int64_t end) {
           if (packed) return tally(call, weighs, begin, end, [&](int64_t i) { return packed[i]; });
           return tally(call, weighs, begin, end,
                        [&](int64_t i) { return call.target_at(call.dims.offset(call.target, i)); });
         })) {
      if (part.refusal.bad) return part.refusal;
      count += part.count, weights += part.weights;
    }
  }
  if (reduction == Reduction::mean) {
    const bool given = num_items != -__builtin_inf();
    if (!given) weights = normalize(call, weights, count, normal);
    *divisor = given ? num_items : weights;
    if (!given && weights != double(count) && std::isfinite(weights)) call.ratio = weights / double(count);
    call.scale /= *divisor;
  }
  return {false, 0};
}

template <class A>
void reduce(const A* rows, int64_t n, Reduction reduction, double divisor, void* out, DType dtype, int threads) {
  if (reduction == Reduction::none) return store_numbers(out, dtype, rows, n);
  double total = 0;
  for (double part : by_groups<double>(n, threads_for(n * 4, threads), [&](int64_t i, int64_t end) {
         constexpr int64_t LANES = 16;
         double sums[LANES] = {}, sum = 0;
         for (; i + LANES <= end; i += LANES)
           for (int64_t j = 0; j < LANES; j++) sums[j] += rows[i + j];
         for (; i < end; i++) sums[0] += rows[i];
         for (double of_lane : sums) sum += of_lane;
         return sum;
       }))
    total += part;
  store_number(out, 0, dtype, total / divisor);
}

}  // namespace

int saved_columns(int64_t classes, bool probs, bool wants_stats) {
  return classes <= FEW_CLASSES ? 0 : SAVED_Y + probs + wants_stats;
}

bool lanes_across_rows(const Call& call) {
  if (call.C <= FEW_CLASSES) return true;
  // Pixels lie side by side in the gradient, and mostly in the logits; rows do in transposed logits.
  const int64_t N = call.dims.sizes[0], pixels = N > 0 ? call.rows / N : 1;
  const int64_t side_by_side = pixels > 1 ? pixels : call.input.class_stride != 1 && call.input.strides[0] == 1 ? N : 1;
  return side_by_side >= FEW_ROWS;
}

void Team::wait() const {
  if (size == 1) return;
  const int round = barrier->round;
  if (++barrier->arrived == size) {
    barrier->arrived = 0;
    barrier->round++;
  } else {
    while (barrier->round == round) std::this_thread::yield();
  }
}

Refusal forward(Call call, Reduction reduction, double num_items, void* loss, DType loss_dtype, int threads) {
  double divisor = 1;
  std::unique_ptr<float[]> normal;
  const Refusal refusal = prepare(call, reduction, num_items, threads, &divisor, normal);
  if (refusal.bad) return refusal;
  const DType dtype = call.input.dtype, acc = dtype == DType::float64 ? dtype : DType::float32;
  if (reduction == Reduction::none && (loss_dtype == acc || loss_dtype == dtype)) {
    call.loss = loss;
    call.rounds_loss = loss_dtype != acc;
    run_all_rows(call, threads);
    return refusal;
  }
  const Scratch losses(kept_losses, call.rows * int64_t(sizeof(double)), KEPT_SCRATCH);  // of either acc
  call.loss = losses.data;
  run_all_rows(call, threads);
  if (call.input.dtype == DType::float64)
    reduce(reinterpret_cast<double*>(losses.data), call.rows, reduction, divisor, loss, loss_dtype, threads);
  else reduce(reinterpret_cast<float*>(losses.data), call.rows, reduction, divisor, loss, loss_dtype, threads);
  return refusal;
}

Refusal backward(Call call, Reduction reduction, double num_items, int threads) {
  double divisor = 1;
  call.loss = nullptr;
  std::unique_ptr<float[]> normal;
  const Refusal refusal = prepare(call, reduction, num_items, threads, &divisor, normal);
  if (!refusal.bad) run_all_rows(call, threads);
  return refusal;
}

Refusal of_shard(const Call& call, int threads) { return backward(call, Reduction::none, 0, threads); }

}  // namespace fused_ce
