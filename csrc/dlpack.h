// Tensors in the form that torch exchanges with other libraries: the structs of dlpack.h, version 0.x for a tensor in
// memory of the pool, written down here because their layout is fixed and no header of torch's is needed for it.
#pragma once
#include <cstdint>

#include "cross_entropy.h"

namespace fused_ce::dlpack {

struct Device { int32_t type, id; };
constexpr Device CPU{1, 0};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};

// Which of ours it is; false: none.
bool find(DataType code, DType& dtype);

struct ManagedTensor {
  Tensor tensor;
  void* owner;
  void (*deleter)(ManagedTensor*);
};

// A contiguous tensor of at most MAX_DIMS dimensions, whose deleter gives its memory back; null where the pool does not
// serve.
ManagedTensor* make(const int64_t* sizes, int dims, DType dtype);

}  // namespace fused_ce::dlpack
