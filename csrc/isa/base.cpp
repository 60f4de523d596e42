#include "../dispatch.h"

#define VECTOR_BYTES 16
namespace fused_ce {
namespace base {
#include "../simd.inl.h"

#include "../cross_entropy.inl.h"

#include "../across.inl.h"
}  // namespace base
const RowsFunction* const base_rows = base::rows_functions;
}  // namespace fused_ce
