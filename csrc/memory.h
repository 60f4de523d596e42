// A pool of large blocks for gradients and scratch. A fresh block costs more in page faults and zeroing than the
// kernels take to fill it; one that was used before has its pages. No Python: blocks come back at interpreter exit, on
// any thread.
#pragma once
#include <cstdint>

namespace fused_ce::memory {

// At most this many bytes stay idle. 0, as at first: there is no pool.
void keep_at_most(int64_t bytes);

// At least `bytes`, aligned to 2 MiB, of any content. Null where the pool does not serve: it is off, it could not keep
// a block of this size, or there is no memory. Throws std::bad_alloc where there is not even some for its list.
void* take(int64_t bytes);

void give_back(void* block) noexcept;

// Unmaps all that is idle.
void empty_cache();

struct Held { int64_t used, idle; };
Held held();

// Whether take() gave this memory.
bool is_lent(const void* data);

}  // namespace fused_ce::memory
