// Calls of forward() and backward() without Python, on several threads at once, for ThreadSanitizer: which rows each
// thread takes, the threads that share a row, the reductions, and two callers at a time. Values are of no interest here
// but for one thing: the same call with one thread must leave the same bits.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "dispatch.h"

using namespace fused_ce;
using Bytes = std::vector<char>;

namespace {

struct Random {
  std::mt19937_64 engine;
  int64_t up_to(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  template <class T> T one_of(std::initializer_list<T> choices) { return choices.begin()[up_to(choices.size())]; }
};

int64_t width(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

Bytes floats(Random& random, DType dtype, int64_t n) {
  Bytes memory(n * width(dtype));
  for (int64_t i = 0; i < n; i++) {
    const double value = double(random.up_to(2001) - 1000) / 128;
    const float narrow = float(value);
    if (dtype == DType::float64) std::memcpy(&memory[i * 8], &value, 8);
    else if (dtype == DType::float32) std::memcpy(&memory[i * 4], &narrow, 4);
    // The upper half of a float32 is a bfloat16; as a float16 it is another number, but one.
    else std::memcpy(&memory[i * 2], reinterpret_cast<const char*>(&narrow) + 2, 2);
  }
  return memory;
}

View view(Bytes& memory, DType dtype, int64_t class_stride, int64_t row_stride) {
  View result{};
  result.data = memory.data(), result.dtype = dtype, result.class_stride = class_stride;
  result.strides[0] = row_stride;
  return result;
}

// Loss, gradient and saved rows of one random call by `threads` threads.
Bytes results(uint64_t seed, int threads) {
  Random random{std::mt19937_64(seed)};
  const DType dtype = random.one_of({DType::float32, DType::float64, DType::bfloat16, DType::float16});
  // Wide rows are few, so that threads share one; the barrier's rounds are what is most likely wrong.
  const int64_t C = random.one_of<int64_t>({3, 64, 300, 2049, 20000, 40000});
  const int64_t rows = C >= 20000 ? 1 + random.up_to(4) : 1 + random.up_to(200000 / C), n = rows * C;
  const bool probs = random.up_to(4) == 0, class_last = random.up_to(3) > 0, fused = random.up_to(2);
  const int64_t class_stride = class_last ? 1 : rows, row_stride = class_last ? C : 1;
  Bytes input = floats(random, dtype, n), grad(n * width(dtype)), loss(rows * 8), target(rows * 8);
  Bytes saved(rows * 4 * sizeof(double)), stats(rows * sizeof(Stats));
  const DType acc = dtype == DType::float64 ? dtype : DType::float32;
  Bytes weight = floats(random, acc, C), upstream = floats(random, acc, rows);

  Call call{};
  call.C = call.total = C, call.rows = rows, call.dims.rank = 1, call.dims.sizes[0] = rows, call.scale = 1;
  call.options = {-100, random.up_to(2) * 0.1, random.up_to(2) ? 1 : 0.7, random.up_to(2) * 5.0, random.up_to(2) * 0.01};
  call.input = view(input, dtype, class_stride, row_stride);
  if (probs) {
    target = floats(random, DType::float32, n);
    call.target = view(target, DType::float32, 1, C);
  } else {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t y = random.up_to(10) ? random.up_to(C) : -100;
      std::memcpy(&target[r * 8], &y, 8);
    }
    call.target = view(target, DType::int64, 0, 1);
  }
  call.probs = probs;
  call.across = lanes_across_rows(call);
  if (random.up_to(2)) call.weight = weight.data();
  if (random.up_to(2)) call.stats = reinterpret_cast<Stats*>(stats.data());
  call.wants_stats = call.stats;
  call.saved = reinterpret_cast<double*>(saved.data());
  const View dx = view(grad, dtype, 1, C);
  if (fused) call.grad = dx;
  const Reduction reduction = random.one_of({Reduction::none, Reduction::mean, Reduction::sum});
  if (forward(call, reduction, NAN, loss.data(), dtype, threads).bad) std::abort();
  if (!fused) {
    call.grad = dx, call.stats = nullptr, call.upstream = upstream.data();
    if (backward(call, reduction, NAN, threads).bad) std::abort();
  }
  Bytes all = loss;
  for (const Bytes* part : {&grad, &saved, &stats}) all.insert(all.end(), part->begin(), part->end());
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "tsan_driver CALLS SEED\n"), 2;
  const int calls = std::atoi(argv[1]);
  const uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  isa();  // importing the module chooses it
  std::vector<int> different(2);
  auto caller = [&](int who) {
    for (int i = who; i < calls; i += 2) {
      const uint64_t at = seed * 1000003 + i;
      different[who] += results(at, 2 + i % 3) != results(at, 1);
    }
  };
  std::thread other(caller, 1);
  caller(0);
  other.join();
  std::printf("%d calls of seed %llu, %d with other bits than on one thread\n", calls,
              static_cast<unsigned long long>(seed), different[0] + different[1]);
  return different[0] + different[1] != 0;
}
