// Blocks from mmap in two short lists, used and idle, under one mutex.
#include "memory.h"

#include <mutex>
#include <vector>
#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace fused_ce::memory {
#ifdef __linux__
namespace {

constexpr int64_t HUGE_PAGE = 1 << 21;

struct Block {
  void* data;
  int64_t bytes;
};

struct Pool {
  std::mutex mutex;
  // Either has room for all blocks, so that one can move to the other without an exception.
  std::vector<Block> used, idle;  // those that are idle longest come first
  Held bytes{0, 0};
  int64_t most_used = 0;  // bytes, at the same time
  int64_t most_idle = 0;  // bytes allowed
};

// Never destroyed: tensors may outlive every destructor of this library.
Pool& pool() {
  static Pool& pool = *new Pool;
  return pool;
}

// A child forked while another thread holds the mutex would wait for that thread for ever.
[[maybe_unused]] const int at_fork =
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });

void* map(int64_t bytes) {
  void* const found = mmap(nullptr, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  const int64_t before = -reinterpret_cast<intptr_t>(found) & (HUGE_PAGE - 1);
  char* const data = static_cast<char*>(found) + before;
  if (before) munmap(found, before);
  munmap(data + bytes, HUGE_PAGE - before);
  madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}

void shrink_idle(Pool& p, int64_t bytes) {
  auto block = p.idle.begin();
  for (; p.bytes.idle > bytes; ++block) {
    munmap(block->data, block->bytes);
    p.bytes.idle -= block->bytes;
  }
  p.idle.erase(p.idle.begin(), block);
}

// The smallest idle block that holds `bytes` and is at most twice as large; or null.
void* reuse(Pool& p, int64_t bytes) {
  auto best = p.idle.end();
  for (auto block = p.idle.begin(); block != p.idle.end(); ++block)
    if (block->bytes >= bytes && block->bytes <= 2 * bytes && (best == p.idle.end() || block->bytes < best->bytes))
      best = block;
  if (best == p.idle.end()) return nullptr;
  const Block block = *best;
  p.idle.erase(best);
  p.used.push_back(block);
  p.bytes.idle -= block.bytes, p.bytes.used += block.bytes;
  return block.data;
}

}  // namespace

void keep_at_most(int64_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.most_idle = bytes;
  shrink_idle(p, bytes);
}

void* take(int64_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  if (bytes < 1 || bytes > p.most_idle - HUGE_PAGE) return nullptr;  // it could not be kept, rounded up
  bytes = (bytes + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
  if (void* const data = reuse(p, bytes)) return data;
  const size_t blocks = p.used.size() + p.idle.size() + 1;
  p.used.reserve(blocks), p.idle.reserve(blocks);
  // In all no more than was once used at the same time: blocks of changing sizes do not add up.
  const int64_t used = p.bytes.used + bytes, most_used = used > p.most_used ? used : p.most_used;
  shrink_idle(p, most_used - used);
  void* data = map(bytes);
  if (!data) {
    shrink_idle(p, 0);
    data = map(bytes);
  }
  if (!data) return nullptr;
  p.used.push_back({data, bytes});
  p.bytes.used = used, p.most_used = most_used;
  return data;
}

void give_back(void* data) noexcept {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  auto found = p.used.begin();
  while (found->data != data) ++found;
  const Block block = *found;
  p.used.erase(found);
  p.bytes.used -= block.bytes;
  // From now on the system may take the pages when it is short of memory. Where it cannot (locked memory), or where a
  // block is larger than all that may be idle, it is not kept.
  if (block.bytes > p.most_idle || madvise(data, block.bytes, MADV_FREE)) {
    munmap(data, block.bytes);
    return;
  }
  p.idle.push_back(block);
  p.bytes.idle += block.bytes;
  shrink_idle(p, p.most_idle);
}

void empty_cache() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  shrink_idle(p, 0);
  p.most_used = p.bytes.used;
}

Held held() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return p.bytes;
}

bool is_lent(const void* data) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  for (const Block& block : p.used)
    if (block.data == data) return true;
  return false;
}

#else  // systems on which nobody has tried lazily freed pages: every caller has its own allocator

void keep_at_most(int64_t) {}
void* take(int64_t) { return nullptr; }
void give_back(void*) noexcept {}
void empty_cache() {}
Held held() { return {0, 0}; }
bool is_lent(const void*) { return false; }

#endif
}  // namespace fused_ce::memory
