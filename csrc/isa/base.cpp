#include "../dispatch.h"

#define VECTOR_BYTES 16
namespace fused_ce {
namespace base {
#include "../simd/vector.inl.h"

#include "../simd/convert.inl.h"

#include "../simd/math.inl.h"

#include "../formula.inl.h"

#include "../blocks.inl.h"

#include "../along.inl.h"

#include "../strided_rows.inl.h"

#include "../targets.inl.h"

#include "../across.inl.h"

#include "../shard.inl.h"

#include "../rows.inl.h"
}  // namespace base
}  // namespace fused_ce
