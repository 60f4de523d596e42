// One allocation for what DLPack hands over by pointer; the numbers themselves come from the pool.
#include "dlpack.h"

#include <new>

#include "memory.h"

namespace fused_ce::dlpack {
namespace {

struct Lent {
  ManagedTensor managed;
  int64_t sizes[MAX_DIMS], strides[MAX_DIMS];
};

DataType code_of(DType dtype) {
  constexpr uint8_t INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4;
  switch (dtype) {
    case DType::float32: return {FLOAT, 32, 1};
    case DType::float64: return {FLOAT, 64, 1};
    case DType::bfloat16: return {BFLOAT, 16, 1};
    case DType::float16: return {FLOAT, 16, 1};
    case DType::int64: return {INT, 64, 1};
    case DType::uint8: return {UINT, 8, 1};
  }
  return {};
}

void give_back(ManagedTensor* managed) {
  memory::give_back(managed->tensor.data);
  delete static_cast<Lent*>(managed->owner);
}

}  // namespace

bool find(DataType code, DType& dtype) {
  constexpr DType ALL[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16, DType::int64, DType::uint8};
  for (const DType ours : ALL) {
    const DataType one = code_of(ours);
    if (code.code != one.code || code.bits != one.bits || code.lanes != one.lanes) continue;
    dtype = ours;
    return true;
  }
  return false;
}

ManagedTensor* make(const int64_t* sizes, int dims, DType dtype) {
  const DataType code = code_of(dtype);
  int64_t bytes = code.bits / 8;
  for (int d = 0; d < dims; d++)
    if (__builtin_mul_overflow(bytes, sizes[d], &bytes)) return nullptr;
  Lent* const lent = new Lent;
  void* data = nullptr;
  try {
    data = memory::take(bytes);
  } catch (const std::bad_alloc&) {  // torch's allocator finds some, or says so in its own words
  }
  if (!data) {
    delete lent;
    return nullptr;
  }
  int64_t stride = 1;
  for (int d = dims - 1; d >= 0; d--) lent->sizes[d] = sizes[d], lent->strides[d] = stride, stride *= sizes[d];
  lent->managed = {{data, CPU, dims, code, lent->sizes, lent->strides, 0}, lent, give_back};
  return &lent->managed;
}

}  // namespace fused_ce::dlpack
