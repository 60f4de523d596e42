// What Python hands over, checked, as a Call: tensors, numbers, the tuple of options.
#pragma once
#include "cross_entropy.h"
#include "python.h"

namespace fused_ce::arguments {

// Of options.Options.
Reduction reduction_of(PyObject* options);

DType acc_of(const Call& call);

// Of a whole row's classes.
Call make_call(PyObject* input, PyObject* target, PyObject* weight, PyObject* options, PyObject* grad,
               PyObject* d_target);

// Of a shard's, which the options name; `weight`: those of all classes.
Call shard_call(PyObject* input, PyObject* target, PyObject* weight, PyObject* options, PyObject* grad, PyObject* sums);

// The address of what forward saves.
double* saved_of(PyObject* tensor, const Call& call);

}  // namespace fused_ce::arguments
