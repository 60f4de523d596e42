// Knows the names of torch's attributes, and of a call only what every drop-in has to ask.
#include "tensors.h"

namespace fused_ce::tensors {

using namespace python;

namespace {

// DLPack's table, version 1.x, as far as it is used.
struct ExchangeApi {
  struct { uint32_t major, minor; } version;
  ExchangeApi* before;
  void *allocate, *lend, *take;
  int (*read)(void* tensor, dlpack::Tensor* out);  // not 0: a Python error is set
};

const ExchangeApi* api;
PyTypeObject* plain[2];  // kept for good, like the module
PyObject *is_neg, *requires_grad;

// Of a storage that was freed, a tensor's address is what its offset alone makes it. Where it is no address that an
// allocator would give either, Python looks closer.
constexpr uintptr_t LEAST_ADDRESS = uintptr_t(1) << 40;

bool any_is_at_work(PyObject* watchers) {
  if (!PyTuple_Check(watchers)) raise(PyExc_TypeError, "expected a tuple of functions");
  for (Py_ssize_t i = 0; i < PyTuple_Size(watchers); i++)
    if (is_true(Owned(PyObject_CallNoArgs(PyTuple_GetItem(watchers, i))).get())) return true;
  return false;
}

bool is_on_cpu(const Tensor& seen) { return seen.device.type == dlpack::CPU.type; }

// A tensor whose elements the kernels can read where they lie.
bool is_plain(PyObject* tensor, Tensor& seen) {
  if (Py_TYPE(tensor) != plain[0] && Py_TYPE(tensor) != plain[1]) return false;
  if (api->read(tensor, &seen)) {
    PyErr_Clear();
    return false;
  }
  if (!is_on_cpu(seen) || seen.dims > MAX_DIMS || !dlpack::find(seen.dtype, seen.ours)) return false;
  if (uintptr_t(seen.data) < LEAST_ADDRESS) return false;
  const bool is_float = seen.ours < DType::int64;
  return !is_float || !is_true(Owned(PyObject_CallMethodObjArgs(tensor, is_neg, nullptr)).get());
}

// torch's own options as numbers and names of the types that it documents, all others as they are by default.
bool are_common(PyObject* options, int64_t& ignore_index, double& smoothing) {
  const auto field = [&](Py_ssize_t i) { return PyTuple_GetItem(options, i); };
  if (!PyTuple_Check(options) || PyTuple_Size(options) != 12) return false;
  if (!PyLong_CheckExact(field(0)) || !PyFloat_CheckExact(field(1)) || !PyFloat_CheckExact(field(2))) return false;
  if (!PyFloat_CheckExact(field(4))) return false;
  int overflow;
  ignore_index = PyLong_AsLongLongAndOverflow(field(0), &overflow);
  smoothing = PyFloat_AsDouble(field(1));
  if (overflow || smoothing > 1 || PyFloat_AsDouble(field(2)) != 1 || PyFloat_AsDouble(field(4)) != 0) return false;
  Reduction reduction;
  if (!find_reduction(field(5), reduction)) return false;
  for (const int i : {3, 6, 7, 8, 11})  // softcap, dtype, num_items, grad_scale, shard
    if (field(i) != Py_None) return false;
  return field(9) == Py_False && field(10) == Py_False;  // inplace, return_stats
}

bool same_sizes(const Tensor& rows, const Tensor& input) {
  if (rows.dims != input.dims - 1) return false;
  for (int d = 0; d < rows.dims; d++)
    if (rows.sizes[d] != input.sizes[d ? d + 1 : 0]) return false;
  return true;
}

}  // namespace

void meet(PyObject* tensor, PyObject* parameter) {
  if (!PyType_Check(tensor) || !PyType_Check(parameter)) raise(PyExc_TypeError, "expected two types");
  const Owned capsule(PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__"));
  const auto* offered = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  if (!offered) throw Raised();
  if (offered->version.major != 1)
    raise(PyExc_ImportError, "expected version 1 of DLPack from torch, got " + std::to_string(offered->version.major));
  api = offered;
  Py_INCREF(tensor), Py_INCREF(parameter);
  plain[0] = reinterpret_cast<PyTypeObject*>(tensor), plain[1] = reinterpret_cast<PyTypeObject*>(parameter);
  is_neg = PyUnicode_InternFromString("is_neg");
  requires_grad = PyUnicode_InternFromString("requires_grad");
}

Tensor read(PyObject* tensor, DType last) {
  if (!api || !PyObject_TypeCheck(tensor, plain[0])) {
    PyErr_Format(PyExc_TypeError, "expected a torch.Tensor, got %R", Py_TYPE(tensor));
    throw Raised();
  }
  Tensor seen{};
  if (api->read(tensor, &seen)) throw Raised();
  if (!is_on_cpu(seen)) refuse("expected a tensor on the cpu");
  if (seen.dims > MAX_DIMS)
    refuse("expected at most " + std::to_string(MAX_DIMS) + " dimensions, got " + std::to_string(seen.dims));
  if (!dlpack::find(seen.dtype, seen.ours) || seen.ours > last)
    refuse("expected a tensor of another dtype; see _C.pyi");
  return seen;
}

void* elements(PyObject* tensor, int64_t count, DType dtype) {
  if (tensor == Py_None) return nullptr;
  const Tensor seen = read(tensor, DType::uint8);
  int64_t found = 1;
  bool contiguous = true;
  for (int d = seen.dims - 1; d >= 0; d--) {
    contiguous &= seen.sizes[d] == 1 || seen.strides[d] == found;
    found *= seen.sizes[d];
  }
  if (found != count || seen.ours != dtype || (found && !(contiguous && seen.data)))
    refuse("expected " + std::to_string(count) + " contiguous elements of the dtype in _C.pyi");
  return seen.data;
}

bool find_reduction(PyObject* name, Reduction& found) {
  if (!PyUnicode_Check(name)) return false;
  const auto is = [&](const char* text) { return PyUnicode_CompareWithASCIIString(name, text) == 0; };
  if (is("mean")) found = Reduction::mean;
  else if (is("sum")) found = Reduction::sum;
  else if (is("none")) found = Reduction::none;
  else return false;
  return true;
}

bool is_common(PyObject* call, PyObject* watchers, PyObject* of_halves) {
  if (!api || !PyTuple_Check(call) || PyTuple_Size(call) != 4) return false;
  PyObject* items[4];
  for (int i = 0; i < 4; i++) items[i] = PyTuple_GetItem(call, i);
  int64_t ignore_index;
  double smoothing;
  if (!are_common(items[3], ignore_index, smoothing)) return false;
  if (any_is_at_work(watchers)) return false;

  Tensor input, target, weight;
  if (!is_plain(items[0], input) || !is_plain(items[1], target)) return false;
  if (input.ours >= DType::int64 || input.dims < 1) return false;
  if (input.dtype.bits == 16 && any_is_at_work(of_halves)) return false;
  const int64_t C = input.sizes[input.dims > 1 ? 1 : 0];
  for (int d = 0; d < input.dims; d++)
    if (input.sizes[d] == 0) return false;
  if (target.ours < DType::int64) {
    if (target.ours != input.ours || target.dims != input.dims || ignore_index >= 0) return false;
    for (int d = 0; d < input.dims; d++)
      if (target.sizes[d] != input.sizes[d]) return false;
  } else if (!same_sizes(target, input) || (target.ours == DType::uint8 && input.dims > 2)) {
    return false;
  }
  if (items[2] == Py_None) return true;
  // torch does not take weights with both uint8 targets and smoothing, and makes a gradient for those that want one.
  return is_plain(items[2], weight) && weight.ours == input.ours && weight.dims == 1 && weight.sizes[0] == C &&
         !(target.ours == DType::uint8 && smoothing > 0) &&
         !is_true(Owned(PyObject_GetAttr(items[2], requires_grad)).get());
}

}  // namespace fused_ce::tensors
