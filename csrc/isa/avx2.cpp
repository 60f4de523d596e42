#include <immintrin.h>

#include "../dispatch.h"

#define VECTOR_BYTES 32
namespace fused_ce {
namespace avx2 {
#include "../simd.inl.h"

#include "../cross_entropy.inl.h"

#include "../across.inl.h"
}  // namespace avx2
const RowsFunction* const avx2_rows = avx2::rows_functions;
}  // namespace fused_ce
