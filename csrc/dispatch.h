// The instruction sets the kernels were compiled for, best first; one is chosen when the module is imported.
#pragma once
#include "cross_entropy.h"

namespace fused_ce {

struct Isa {
  const char* name;
  bool (*runs_here)();
  const RowsFunction* rows;  // by DType
};

const Isa* isas(int* count);     // every compiled one, best first
const Isa& isa();                // the chosen one; at first the best that runs here
bool set_isa(const char* name);  // false: not compiled, or does not run here

// Defined in isa/*.cpp.
extern const RowsFunction* const base_rows;
extern const RowsFunction* const avx2_rows;
extern const RowsFunction* const avx512_rows;

}  // namespace fused_ce
