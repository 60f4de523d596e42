// One call around its rows: check the targets, find the divisor, share the rows among threads, reduce.
#include "cross_entropy.h"

#include <cstdlib>
#include <memory>
#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

#include "dispatch.h"

namespace fused_ce {
namespace {

// Below this many bytes of logits a second thread is taken to cost more than it saves (not measured on an idle
// machine).
[[maybe_unused]] constexpr int64_t SERIAL_BYTES = 1 << 16;
constexpr int64_t HUGE_PAGE = 1 << 21;
constexpr int64_t WIDEST_VECTOR = 64;  // bytes

// Up to this many classes a row's vectors are so few that lanes across rows win.
constexpr int64_t FEW_CLASSES = 64;

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

// Rows in lanes: three vectors a class. Classes in lanes: one number a class, and one a block of (at least 1,024).
int64_t scratch_bytes(const Call& call) {
  return call.across ? 3 * call.C * WIDEST_VECTOR : (call.C + call.C / 1024 + 1) * int64_t(sizeof(double));
}

void run_chunk(const Call& call, int64_t begin, int64_t end) {
  // Kept by each thread: fresh memory of this size would be faulted in, page by page, on every call.
  thread_local struct Scratch {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Scratch() { std::free(data); }
  } scratch;
  const int64_t bytes = (scratch_bytes(call) + WIDEST_VECTOR - 1) & ~(WIDEST_VECTOR - 1);
  if (bytes > scratch.bytes) {
    std::free(scratch.data);
    scratch.data = std::aligned_alloc(WIDEST_VECTOR, bytes);
    scratch.bytes = scratch.data ? bytes : 0;
    if (!scratch.data) std::abort();  // out of memory, where no exception can leave the parallel region
  }
  isa().rows[int(call.input.dtype)](call, begin, end, scratch.data);
}

void run_rows(const Call& call, [[maybe_unused]] int threads) {
  const int64_t bytes = call.rows * call.C * size_of(call.input.dtype);
  if (call.grad.data) advise_huge_pages(call.grad.data, bytes);
#ifdef _OPENMP
  if (threads > call.rows) threads = int(call.rows);
  if (threads > 1 && !forked && bytes >= SERIAL_BYTES) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) run_chunk(call, call.rows * t / threads, call.rows * (t + 1) / threads);
    return;
  }
#endif
  run_chunk(call, 0, call.rows);
}

// Checks every target and finds what the rows share: the scale and, under a mean, L D / count.
Refusal prepare(Call& call, Reduction reduction, double num_items, double* divisor) {
  call.L = call.options.lse_square_scale;
  int64_t count = call.rows;
  double weights = double(count);  // sum of w_y
  if (!call.probs) {
    count = 0;
    weights = 0;
    for (int64_t i = 0; i < call.rows; i++) {
      const int64_t y = call.target_index(i);
      if (y == call.options.ignore_index) continue;
      if (y < 0 || y >= call.C) return {true, y};
      count++;
      if (!call.weight) continue;
      weights += call.input.dtype == DType::float64 ? static_cast<const double*>(call.weight)[y]
                                                    : double(static_cast<const float*>(call.weight)[y]);
    }
    if (!call.weight) weights = double(count);
  }
  if (reduction == Reduction::mean) {
    const bool given = num_items == num_items;  // not NaN
    *divisor = given ? num_items : weights;
    if (!given && weights != double(count)) call.L *= weights / double(count);
    call.scale /= *divisor;
  }
  return {false, 0};
}

uint32_t float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// Both round to nearest even.
uint16_t bfloat16_bits(float value) {
  const uint32_t bits = float_bits(value);
  return uint16_t(value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
uint16_t float16_bits(float value) {
  const uint32_t bits = float_bits(value) & 0x7fffffff, sign = (float_bits(value) >> 16) & 0x8000;
  if (value != value) return uint16_t(sign | 0x7e00);
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
  // A subnormal is rounded at 2^-24 by the adder itself.
  if (bits < 0x38800000) return uint16_t(sign | (float_bits(__builtin_fabsf(value) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13));
}

void store_number(void* p, int64_t i, DType dtype, double value) {
  switch (dtype) {
    case DType::float64: static_cast<double*>(p)[i] = value; break;
    case DType::float32: static_cast<float*>(p)[i] = float(value); break;
    case DType::float16: static_cast<uint16_t*>(p)[i] = float16_bits(float(value)); break;
    default: static_cast<uint16_t*>(p)[i] = bfloat16_bits(float(value));
  }
}

// The order of the additions depends on the number of rows alone, so any number of threads gives the same bits.
template <class A>
void reduce(const A* rows, int64_t n, Reduction reduction, double divisor, void* out, DType dtype) {
  if (reduction == Reduction::none) {
    for (int64_t i = 0; i < n; i++) store_number(out, i, dtype, rows[i]);
    return;
  }
  constexpr int64_t LANES = 16;
  double sums[LANES] = {}, total = 0;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t j = 0; j < LANES; j++) sums[j] += rows[i + j];
  for (; i < n; i++) sums[0] += rows[i];
  for (double sum : sums) total += sum;
  store_number(out, 0, dtype, total / divisor);
}

}  // namespace

bool lanes_across_rows(int64_t C, int64_t class_stride, int row_dims) {
  return C <= FEW_CLASSES || class_stride != 1 || row_dims > 1;
}

Refusal forward(Call call, Reduction reduction, double num_items, void* loss, DType loss_dtype, int threads) {
  double divisor = 1;
  const Refusal refusal = prepare(call, reduction, num_items, &divisor);
  if (refusal.bad) return refusal;
  const std::unique_ptr<double[]> losses(new double[call.rows]);  // large enough for either acc
  call.loss = losses.get();
  run_rows(call, threads);
  if (call.input.dtype == DType::float64) reduce(losses.get(), call.rows, reduction, divisor, loss, loss_dtype);
  else reduce(reinterpret_cast<float*>(losses.get()), call.rows, reduction, divisor, loss, loss_dtype);
  return refusal;
}

Refusal backward(Call call, Reduction reduction, double num_items, int threads) {
  double divisor = 1;
  call.loss = nullptr;
  const Refusal refusal = prepare(call, reduction, num_items, &divisor);
  if (!refusal.bad) run_rows(call, threads);
  return refusal;
}

}  // namespace fused_ce
