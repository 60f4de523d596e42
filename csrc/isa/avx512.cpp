#include <immintrin.h>

#include "../dispatch.h"

#define VECTOR_BYTES 64
namespace fused_ce {
namespace avx512 {
#include "../simd.inl.h"

#include "../cross_entropy.inl.h"

#include "../across.inl.h"
}  // namespace avx512
const RowsFunction* const avx512_rows = avx512::rows_functions;
}  // namespace fused_ce
