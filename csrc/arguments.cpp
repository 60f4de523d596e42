// What Python hands over, checked, as a Call.
#include "arguments.h"

#include "tensors.h"

namespace fused_ce::arguments {

using namespace python;

namespace {

// A tensor with its classes along `class_dim`, or without them (-1).
View view(const tensors::Tensor& seen, int class_dim, const Call& call) {
  View result{};
  result.data = seen.data;
  if (!result.data && call.rows > 0) refuse("expected the address of a tensor's elements, got 0");
  result.dtype = seen.ours;
  int d = 0;
  for (int i = 0; i < seen.dims; i++) {
    const bool is_class = i == class_dim;
    if ((!is_class && d >= call.dims.rank) || seen.sizes[i] != (is_class ? call.C : call.dims.sizes[d]))
      refuse("sizes of input and target differ");
    (is_class ? result.class_stride : result.strides[d++]) = seen.strides[i];
  }
  if (d != call.dims.rank || class_dim >= seen.dims) refuse("dimensions of input and target differ");
  return result;
}

// Of a gradient, which is None where none is wanted, and else of the dtype of what it belongs to.
View view_of_grad(PyObject* tensor, const View& of, int class_dim, const Call& call) {
  if (tensor == Py_None) return {};
  const View result = view(tensors::read(tensor, DType::float16), class_dim, call);
  if (result.data && result.dtype != of.dtype) refuse("expected a gradient of its tensor's dtype");
  return result;
}

// Merges row dimensions that lie one after the other in every tensor: most calls come down to one or two.
void merge_dims(Call& call) {
  View* const views[] = {&call.input, &call.target, &call.grad, &call.d_target};
  RowDims& dims = call.dims;
  int kept = 0;
  for (int d = 1; d < dims.rank; d++) {
    if (dims.sizes[d] == 1) continue;  // its strides mean nothing
    bool merges = true;
    for (const View* v : views) merges &= !v->data || v->strides[kept] == v->strides[d] * dims.sizes[d];
    merges |= dims.sizes[kept] == 1;
    if (!merges) kept++;
    dims.sizes[kept] = merges ? dims.sizes[kept] * dims.sizes[d] : dims.sizes[d];
    for (View* v : views) v->strides[kept] = v->strides[d];
  }
  dims.rank = kept + 1;
}

// The first five fields of options.Options, in its order. torch reads a smoothing that is not above zero as none.
Options options_of(PyObject* fields) {
  const double e = real(item(fields, 1));
  PyObject* const cap = item(fields, 3);
  return {number(item(fields, 0)), e > 0 ? e : 0, real(item(fields, 2)), cap != Py_None ? real(cap) : 0,
          real(item(fields, 4))};
}

}  // namespace

Reduction reduction_of(PyObject* options) {
  Reduction found;
  if (!tensors::find_reduction(item(options, 5), found)) refuse("reduction must be none, mean or sum");
  return found;
}

DType acc_of(const Call& call) { return call.input.dtype == DType::float64 ? DType::float64 : DType::float32; }

Call make_call(PyObject* input, PyObject* target, PyObject* weight, PyObject* options, PyObject* grad,
               PyObject* d_target) {
  const tensors::Tensor logits = tensors::read(input, DType::float16);
  const int dim = logits.dims, class_dim = dim > 1 ? 1 : 0;
  if (dim < 1) refuse("expected 1 to " + std::to_string(MAX_DIMS) + " dimensions, got none");
  Call call{};
  call.C = call.total = logits.sizes[class_dim];
  call.rows = 1;
  call.dims.rank = 0;
  for (int i = 0; i < dim; i++) {
    if (i == class_dim) continue;
    call.dims.sizes[call.dims.rank++] = logits.sizes[i];
    call.rows *= logits.sizes[i];
  }
  if (call.C < 1) refuse("expected at least one class, got " + std::to_string(call.C));
  call.input = view(logits, class_dim, call);
  const tensors::Tensor labels = tensors::read(target, DType::uint8);
  call.probs = labels.ours < DType::int64;
  call.target = view(labels, call.probs ? class_dim : -1, call);
  call.grad = view_of_grad(grad, call.input, class_dim, call);
  call.d_target = view_of_grad(d_target, call.target, class_dim, call);
  if (call.dims.rank == 0) call.dims.sizes[call.dims.rank++] = 1;
  call.across = lanes_across_rows(call);
  if (call.rows > 0) merge_dims(call);
  call.weight = tensors::elements(weight, call.C, acc_of(call));
  call.options = options_of(options);
  call.scale = 1;
  return call;
}

double* saved_of(PyObject* tensor, const Call& call) {
  // A graph asks for statistics whether or not the entropy gets an upstream gradient: it may have a column to spare.
  bool wants_stats = call.wants_stats;
  if (tensor != Py_None) {
    const tensors::Tensor seen = tensors::read(tensor, DType::float64);
    wants_stats |= seen.dims > 0 && seen.sizes[0] > saved_columns(call.C, call.probs, false);
  }
  const int64_t count = saved_columns(call.C, call.probs, wants_stats) * call.rows;
  return static_cast<double*>(tensors::elements(tensor, count, DType::float64));
}

Call shard_call(PyObject* input, PyObject* target, PyObject* weight, PyObject* options, PyObject* grad,
                PyObject* sums) {
  Call call = make_call(input, target, Py_None, options, grad, Py_None);
  if (call.probs) refuse("expected class indices for a shard, got probabilities");
  if (PyObject* const shard = item(options, 11); shard != Py_None) {
    call.first = number(item(shard, 0)), call.total = number(item(shard, 1));
    if (call.first < 0 || call.total - call.C < call.first)
      refuse("expected a shard of at least " + std::to_string(call.C) + " classes from " + std::to_string(call.first) +
             " on, got " + std::to_string(call.total) + " classes in all");
  }
  const void* const weights = tensors::elements(weight, call.total, acc_of(call));
  if (weights) call.weight = static_cast<const char*>(weights) + call.first * (acc_of(call) == DType::float64 ? 8 : 4);
  constexpr int64_t FIELDS = 8;
  call.sums = static_cast<double*>(tensors::elements(sums, FIELDS * call.rows, DType::float64));
  if (!call.sums && call.rows > 0) refuse("expected the sums of the rows, got none");
  call.options.lse_square_scale = 0;  // within the upstream gradient of lse
  call.wants_stats = is_true(item(options, 10));
  return call;
}

}  // namespace fused_ce::arguments
