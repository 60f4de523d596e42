// The only file that knows Python: reads pointers, sizes and strides, releases the GIL, raises for a bad target.
#include <pybind11/pybind11.h>

#include <string>

#include "dispatch.h"
#include "dlpack.h"
#include "memory.h"

namespace py = pybind11;
using namespace fused_ce;

namespace {

// Below this many logits the work is shorter than handing the GIL over and back.
constexpr int64_t KEEP_GIL = 4096;

[[noreturn]] void refuse(const std::string& message) { throw py::value_error(message); }

// Python's own functions: pybind11's casts, a dozen a call, would take longer than a small kernel.
PyObject* item(const py::tuple& fields, int64_t i) {
  if (!PyTuple_Check(fields.ptr()) || i >= PyTuple_GET_SIZE(fields.ptr()))
    refuse("expected a tuple with an item " + std::to_string(i) + "; see _C.pyi");
  return PyTuple_GET_ITEM(fields.ptr(), i);
}
int64_t number(const py::tuple& numbers, int64_t i) {
  const int64_t value = PyLong_AsLongLong(item(numbers, i));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
double real(const py::tuple& numbers, int64_t i) {
  const double value = PyFloat_AsDouble(item(numbers, i));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
void* address(const py::tuple& addresses, int64_t i) {
  void* const value = PyLong_AsVoidPtr(item(addresses, i));
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}
py::tuple part(const py::tuple& fields, int64_t i) { return py::reinterpret_borrow<py::tuple>(item(fields, i)); }

DType dtype_of(const py::tuple& fields, int64_t i, DType last) {
  const int64_t code = number(fields, i);
  if (code < 0 || code > int64_t(last))
    refuse("expected a dtype from 0 to " + std::to_string(int(last)) + ", got " + std::to_string(code));
  return DType(code);
}

// (pointer, dtype code, sizes, strides) with the class dimension at `class_dim`, or without one (-1); or None.
View view(const py::object& tensor, int row_dims, int class_dim, DType last, const Call& call) {
  View result{};
  if (tensor.is_none()) return result;
  const auto fields = py::reinterpret_borrow<py::tuple>(tensor);
  const auto sizes = part(fields, 2), strides = part(fields, 3);
  result.data = address(fields, 0);
  if (!result.data && call.rows > 0) refuse("expected the address of a tensor's elements, got 0");
  result.dtype = dtype_of(fields, 1, last);
  int d = 0;
  if (!PyTuple_Check(sizes.ptr()) || !PyTuple_Check(strides.ptr()) || sizes.size() != strides.size())
    refuse("expected as many strides as sizes");
  for (int i = 0; i < int(PyTuple_GET_SIZE(strides.ptr())); i++) {
    const bool is_class = i == class_dim;
    if ((!is_class && d >= row_dims) || number(sizes, i) != (is_class ? call.C : call.dims.sizes[d]))
      refuse("sizes of input and target differ");
    (is_class ? result.class_stride : result.strides[d++]) = number(strides, i);
  }
  if (d != row_dims) refuse("dimensions of input and target differ");
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
Options options_of(const py::tuple& fields) {
  const double e = real(fields, 1);
  const bool capped = item(fields, 3) != Py_None;
  return {number(fields, 0), e > 0 ? e : 0, real(fields, 2), capped ? real(fields, 3) : 0, real(fields, 4)};
}

Reduction reduction_of(const py::tuple& options) {
  PyObject* const name = item(options, 5);
  if (!PyUnicode_Check(name)) refuse("expected the name of a reduction");
  if (PyUnicode_CompareWithASCIIString(name, "mean") == 0) return Reduction::mean;
  if (PyUnicode_CompareWithASCIIString(name, "sum") == 0) return Reduction::sum;
  if (PyUnicode_CompareWithASCIIString(name, "none") == 0) return Reduction::none;
  refuse("reduction must be none, mean or sum");
}

// given: (input, target, address of the weight or 0)
Call make_call(const py::tuple& given, const py::tuple& options, const py::object& grad, const py::object& d_target) {
  const py::tuple input = part(given, 0), target = part(given, 1);
  const auto sizes = part(input, 2);
  const int dim = int(sizes.size()), class_dim = dim > 1 ? 1 : 0;
  if (dim < 1 || dim > MAX_DIMS)
    refuse("expected 1 to " + std::to_string(MAX_DIMS) + " dimensions, got " + std::to_string(dim));
  Call call{};
  call.C = number(sizes, class_dim);
  call.rows = 1;
  call.dims.rank = 0;
  for (int i = 0; i < dim; i++) {
    if (i == class_dim) continue;
    const int64_t size = number(sizes, i);
    if (size < 0) refuse("expected sizes from 0 on, got " + std::to_string(size));
    call.dims.sizes[call.dims.rank++] = size;
    call.rows *= size;
  }
  if (call.dims.rank == 0) call.dims.sizes[call.dims.rank++] = 1;
  if (call.C < 1) refuse("expected at least one class, got " + std::to_string(call.C));
  call.input = view(input, dim - 1, class_dim, DType::float16, call);
  call.probs = dtype_of(target, 1, DType::uint8) < DType::int64;
  call.target = view(target, dim - 1, call.probs ? class_dim : -1, DType::uint8, call);
  call.grad = view(grad, dim - 1, class_dim, call.input.dtype, call);
  if (call.grad.data && call.grad.dtype != call.input.dtype) refuse("expected a gradient of the input's dtype");
  call.d_target = view(d_target, dim - 1, class_dim, call.target.dtype, call);
  call.across = lanes_across_rows(call);
  if (call.rows > 0) merge_dims(call);
  call.weight = address(given, 2);
  call.options = options_of(options);
  call.scale = 1;
  return call;
}

template <class Work> void run(const Call& call, int threads, Work work) {
  if (threads < 1) refuse("expected at least one thread, got " + std::to_string(threads));
  Refusal refusal;
  if (call.rows * call.C < KEEP_GIL) {
    refusal = work();
  } else {
    py::gil_scoped_release release;
    refusal = work();
  }
  if (refusal.bad) throw py::index_error("Target " + std::to_string(refusal.target) + " is out of bounds.");
}

// loss: (address, dtype code)
void forward_py(const py::tuple& given, const py::tuple& options, double num_items, double scale, const py::tuple& loss,
                const py::object& grad, uintptr_t saved, uintptr_t stats, int threads) {
  Call call = make_call(given, options, grad, py::none());
  call.scale = scale;
  call.saved = reinterpret_cast<double*>(saved);
  call.stats = reinterpret_cast<Stats*>(stats);
  void* const out = address(loss, 0);
  const DType dtype = dtype_of(loss, 1, DType::float16);
  const Reduction reduction = reduction_of(options);
  if (!out && (call.rows > 0 || reduction != Reduction::none)) refuse("expected the address of the loss, got 0");
  run(call, threads, [&] { return forward(call, reduction, num_items, out, dtype, threads); });
}

// upstream: (address of one for each row or 0, what multiplies them, address of those of lse or 0)
void backward_py(const py::tuple& given, const py::tuple& options, double num_items, const py::tuple& upstream,
                 const py::object& grad, const py::object& d_target, uintptr_t saved, int threads) {
  Call call = make_call(given, options, grad, d_target);
  if (grad.is_none()) refuse("expected where to write the gradient, got None");
  call.upstream = address(upstream, 0);
  call.scale = real(upstream, 1);
  call.g_lse = address(upstream, 2);
  if (!saved && call.rows > 0) refuse("expected the rows that a forward call saved, got none");
  call.saved = reinterpret_cast<double*>(saved);
  const Reduction reduction = reduction_of(options);
  run(call, threads, [&] { return backward(call, reduction, num_items, threads); });
}

// Both are contract.RowSums, of numbers.
py::tuple combine_py(const py::tuple& sums, const py::tuple& after, bool probs) {
  double numbers[8], more[8];
  for (int i = 0; i < 8; i++) numbers[i] = real(sums, i), more[i] = real(after, i);
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
    wanted[d] = number(sizes, d);
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
  m.def("forward", forward_py);
  m.def("backward", backward_py);
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
  m.attr("stats_size") = sizeof(Stats) / sizeof(double);
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
