#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace fused_ce {
namespace {

bool always() { return true; }

#ifdef FUSED_CE_AVX2
// Every processor with AVX2 converts float16 too; clang does not know how to ask.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#ifdef FUSED_CE_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Isa all[] = {
#ifdef FUSED_CE_AVX512
    {"avx512", has_avx512, avx512::rows_functions, avx512::combine_numbers},
#endif
#ifdef FUSED_CE_AVX2
    {"avx2", has_avx2, avx2::rows_functions, avx2::combine_numbers},
#endif
    {"base", always, base::rows_functions, base::combine_numbers},
};
const Isa* best() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();  // this runs before main, maybe before what else would
#endif
  const Isa* i = all;
  while (!i->runs_here()) i++;
  return i;
}

// Chosen when the library is loaded: calls on several threads only read it.
std::atomic<const Isa*> chosen{best()};

}  // namespace

const Isa* isas(int* count) {
  *count = sizeof all / sizeof all[0];
  return all;
}

const Isa& isa() { return *chosen.load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
  for (const Isa& i : all)
    if (!std::strcmp(i.name, name) && i.runs_here()) {
      chosen = &i;
      return true;
    }
  return false;
}

}  // namespace fused_ce
