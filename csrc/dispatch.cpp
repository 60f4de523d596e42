#include "dispatch.h"

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
const Isa* chosen = nullptr;

}  // namespace

const Isa* isas(int* count) {
  *count = sizeof all / sizeof all[0];
  return all;
}

const Isa& isa() {
  for (const Isa* i = all; !chosen; i++)
    if (i->runs_here()) chosen = i;
  return *chosen;
}

bool set_isa(const char* name) {
  for (const Isa& i : all)
    if (!std::strcmp(i.name, name) && i.runs_here()) {
      chosen = &i;
      return true;
    }
  return false;
}

}  // namespace fused_ce
