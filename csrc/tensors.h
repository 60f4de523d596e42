// torch's tensors as C sees them, through the table of functions that torch offers to C (DLPack's exchange API): a
// tenth of the time that the same takes through a tensor's attributes in Python.
#pragma once
#include "dlpack.h"
#include "python.h"

namespace fused_ce::tensors {

// Before anything else here: the type of torch's tensors, whose attribute the table is, and that of parameters.
void meet(PyObject* tensor, PyObject* parameter);

struct Tensor : dlpack::Tensor { DType ours; };

// What a tensor on the CPU says of itself, for as long as it lives. Throws torch's own error where it has no strides or
// address, and one of ours where it is elsewhere or of a dtype after `last`.
Tensor read(PyObject* tensor, DType last);

// The address of a contiguous tensor of `count` elements; null for None.
void* elements(PyObject* tensor, int64_t count, DType dtype);

// "none", "mean" or "sum"; false: something else.
bool find_reduction(PyObject* name, Reduction& found);

// Whether a call (contract.Call) is as most are, so that nothing else need be asked about it: torch's plain tensors on
// the CPU, of dtypes and shapes that fit, with memory; options that torch's cross entropy knows, as torch takes them;
// and none of `watchers`, functions without arguments, says that something is at work; nor, for logits of 16 bits, of
// `of_halves`. Where false, it may still be the kernels' call.
bool is_common(PyObject* call, PyObject* watchers, PyObject* of_halves);

}  // namespace fused_ce::tensors
