// The instruction sets the kernels were compiled for, best first; one is chosen when the module is imported.
#pragma once
#include "cross_entropy.h"

// The exp of every glibc since the first, so that a wheel asks for 2.28 (manylinux_2_28): the same function, beside the
// one of 2.29, which leaves errno alone. No other symbol here is newer.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17");
#endif

namespace fused_ce {

struct Isa {
  const char* name;
  bool (*runs_here)();
  const RowsFunction* rows;  // by DType
  CombineFunction combine;
};

const Isa* isas(int* count);     // every compiled one, best first
const Isa& isa();                // the chosen one; at first the best that runs here
bool set_isa(const char* name);  // false: not compiled, or does not run here

// Defined in isa/*.cpp, for each instruction set.
namespace base {
extern const RowsFunction rows_functions[4];
void combine_numbers(double* sums, const double* after, bool probs);
}  // namespace base
namespace avx2 {
extern const RowsFunction rows_functions[4];
void combine_numbers(double* sums, const double* after, bool probs);
}  // namespace avx2
namespace avx512 {
extern const RowsFunction rows_functions[4];
void combine_numbers(double* sums, const double* after, bool probs);
}  // namespace avx512

}  // namespace fused_ce
