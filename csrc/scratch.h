// What a call needs besides its tensors. Made before its threads start: no exception could leave a parallel region.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "memory.h"

namespace fused_ce {

constexpr int64_t WIDEST_VECTOR = 64;  // bytes

// Small memory stays with the thread that calls: fresh memory would be faulted in, page by page, on every call. Large
// memory is the pool's, or where that does not serve, fresh. Throws std::bad_alloc.
class Scratch {
  using Memory = std::unique_ptr<void, void (*)(void*)>;
  Memory large{nullptr, memory::give_back};

 public:
  struct Kept {
    Memory memory{nullptr, std::free};
    int64_t bytes = 0;
  };

  char* data;
  Scratch(Kept& kept, int64_t bytes, int64_t most_kept) {
    if (bytes > most_kept) {
      large.reset(memory::take(bytes));
      if (!large) large = fresh(bytes);
    } else if (kept.bytes < bytes) {
      kept.bytes = 0;
      kept.memory.reset();  // first, so as not to hold both
      kept.memory = fresh(bytes);
      kept.bytes = bytes;
    }
    data = static_cast<char*>(bytes > most_kept ? large.get() : kept.memory.get());
  }

 private:
  static Memory fresh(int64_t bytes) {
    void* const data = std::aligned_alloc(WIDEST_VECTOR, (bytes + WIDEST_VECTOR - 1) / WIDEST_VECTOR * WIDEST_VECTOR);
    if (!data) throw std::bad_alloc();
    return {data, std::free};
  }
};

}  // namespace fused_ce
