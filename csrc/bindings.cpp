// What Python calls: reads tensors and options into a Call, releases the GIL, raises for a bad target.
#include <pybind11/pybind11.h>

#include <string>

#include "dispatch.h"
#include "dlpack.h"
#include "memory.h"
#include "tensors.h"

namespace py = pybind11;
using namespace fused_ce;

namespace {

// Below this many logits the work is shorter than handing the GIL over and back.
constexpr int64_t KEEP_GIL = 4096;

[[noreturn]] void refuse(const std::string& message) { throw py::value_error(message); }

// Python's own functions: pybind11's casts, a dozen a call, would take longer than a small kernel.
PyObject* item(PyObject* fields, Py_ssize_t i) {
  if (!PyTuple_Check(fields) || i >= PyTuple_GET_SIZE(fields))
    refuse("expected a tuple with an item " + std::to_string(i) + "; see _C.pyi");
  return PyTuple_GET_ITEM(fields, i);
}
int64_t number(PyObject* from) {
  const int64_t value = PyLong_AsLongLong(from);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
double real(PyObject* from) {
  const double value = PyFloat_AsDouble(from);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

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
  call.C = logits.sizes[class_dim];
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
  const int64_t count = saved_columns(call.C, call.probs) * call.rows;
  return static_cast<double*>(tensors::elements(tensor, count, DType::float64));
}

template <class Work> PyObject* run(const Call& call, PyObject* threads, Work work) {
  const int64_t count = number(threads);
  if (count < 1) refuse("expected at least one thread, got " + std::to_string(count));
  Refusal refusal;
  if (call.rows * call.C < KEEP_GIL) {
    refusal = work(int(count));
  } else {
    py::gil_scoped_release release;
    refusal = work(int(count));
  }
  if (refusal.bad) throw py::index_error("Target " + std::to_string(refusal.target) + " is out of bounds.");
  Py_RETURN_NONE;
}

// As Python calls functions of C. What pybind11 does for each argument would take longer than a small kernel.
using Arguments = PyObject* const*;

template <PyObject* (*Body)(Arguments), int Count> PyObject* called(PyObject*, Arguments given, Py_ssize_t count) {
  try {
    if (count != Count) throw py::type_error("expected " + std::to_string(Count) + " arguments; see _C.pyi");
    return Body(given);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// input, target, weight, options, num_items, scale, loss, grad, saved, stats, threads
PyObject* forward_py(Arguments given) {
  Call call = make_call(given[0], given[1], given[2], given[3], given[7], Py_None);
  const Reduction reduction = reduction_of(given[3]);
  const double num_items = real(given[4]);
  call.scale = real(given[5]);
  const DType dtype = tensors::read(given[6], DType::float16).ours;
  void* const loss = tensors::elements(given[6], reduction == Reduction::none ? call.rows : 1, dtype);
  call.saved = saved_of(given[8], call);
  constexpr int64_t FIELDS = sizeof(Stats) / sizeof(double);
  call.stats = static_cast<Stats*>(tensors::elements(given[9], FIELDS * call.rows, DType::float64));
  return run(call, given[10], [&](int threads) { return forward(call, reduction, num_items, loss, dtype, threads); });
}

// input, target, weight, options, num_items, upstream, scale, upstream of lse, grad, gradient of target, saved, threads
PyObject* backward_py(Arguments given) {
  Call call = make_call(given[0], given[1], given[2], given[3], given[8], given[9]);
  if (given[8] == Py_None) refuse("expected where to write the gradient, got None");
  if (given[10] == Py_None) refuse("expected the rows that a forward call saved, got none");
  const Reduction reduction = reduction_of(given[3]);
  const double num_items = real(given[4]);
  call.upstream = tensors::elements(given[5], call.rows, acc_of(call));
  call.scale = real(given[6]);
  call.g_lse = tensors::elements(given[7], call.rows, acc_of(call));
  call.saved = saved_of(given[10], call);
  return run(call, given[11], [&](int threads) { return backward(call, reduction, num_items, threads); });
}

// call, watchers, watchers of 16 bits
PyObject* is_common_py(Arguments given) { return PyBool_FromLong(tensors::is_common(given[0], given[1], given[2])); }

PyMethodDef FAST[] = {
    {"is_common", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called<is_common_py, 3>)), METH_FASTCALL,
     ""},
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called<forward_py, 11>)), METH_FASTCALL, ""},
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called<backward_py, 12>)), METH_FASTCALL,
     ""},
    {}};

// Both are contract.RowSums, of numbers.
py::tuple combine_py(const py::tuple& sums, const py::tuple& after, bool probs) {
  double numbers[8], more[8];
  for (int i = 0; i < 8; i++) numbers[i] = real(item(sums.ptr(), i)), more[i] = real(item(after.ptr(), i));
  isa().combine(numbers, more, probs);
  py::tuple joined(8);
  for (int i = 0; i < 8; i++) joined[i] = numbers[i];
  return joined;
}

// Who takes the tensor renames the capsule, and calls the deleter himself.
constexpr const char* UNTAKEN = "dltensor";

// A capsule for torch's from_dlpack; None where the pool does not serve.
py::object empty_py(const py::tuple& sizes, int64_t dtype) {
  const int64_t dims = PyTuple_Check(sizes.ptr()) ? int64_t(sizes.size()) : -1;
  if (dims < 0 || dims > MAX_DIMS) refuse("expected a tuple of at most " + std::to_string(MAX_DIMS) + " sizes");
  if (dtype < 0 || dtype > int64_t(DType::uint8)) refuse("expected a dtype from 0 to 5, got " + std::to_string(dtype));
  int64_t wanted[MAX_DIMS];
  for (int64_t d = 0; d < dims; d++) {
    wanted[d] = number(item(sizes.ptr(), d));
    if (wanted[d] < 0) refuse("expected sizes from 0 on, got " + std::to_string(wanted[d]));
  }
  dlpack::ManagedTensor* made;
  {
    py::gil_scoped_release release;  // unmapping what is in the way takes some time
    made = dlpack::make(wanted, int(dims), DType(dtype));
  }
  if (!made) return py::none();
  PyObject* const capsule = PyCapsule_New(made, UNTAKEN, [](PyObject* self) {
    if (!PyCapsule_IsValid(self, UNTAKEN)) return;
    auto* const untaken = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(self, UNTAKEN));
    untaken->deleter(untaken);
  });
  if (!capsule) {
    made->deleter(made);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(capsule);
}

py::list isa_names() {
  py::list names;
  int count;
  const Isa* all = isas(&count);
  for (int i = 0; i < count; i++)
    if (all[i].runs_here()) names.append(all[i].name);
  return names;
}

void set_isa_py(const std::string& name) {
  if (!set_isa(name.c_str()))
    refuse("instruction set must be one of " + py::str(isa_names()).cast<std::string>() + ", got '" + name +
           "'; unset FUSED_CE_ISA to take the best");
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  if (PyModule_AddFunctions(m.ptr(), FAST)) throw py::error_already_set();
  m.def("meet", tensors::meet);
  m.def("combine", combine_py);
  m.def("empty", empty_py);
  m.def("keep_at_most", memory::keep_at_most);
  m.def("empty_cache", memory::empty_cache, py::call_guard<py::gil_scoped_release>());
  m.def("held", [] {
    const memory::Held held = memory::held();
    return py::make_tuple(held.used, held.idle);
  });
  m.def("isa", [] { return isa().name; });
  m.def("isa_names", isa_names);
  m.def("set_isa", set_isa_py);
#ifdef __clang__
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
  m.attr("few_classes") = FEW_CLASSES;
  m.attr("stats_size") = sizeof(Stats) / sizeof(double);
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
