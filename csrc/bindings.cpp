// The only file that knows Python: reads pointers, sizes and strides, releases the GIL, raises for a bad target.
#include <pybind11/pybind11.h>

#include <string>

#include "dispatch.h"

namespace py = pybind11;
using namespace fused_ce;

namespace {

// Below this many logits the work is shorter than handing the GIL over and back.
constexpr int64_t KEEP_GIL = 4096;

[[noreturn]] void refuse(const std::string& message) { throw py::value_error(message); }

// Python's own functions: pybind11's casts, a dozen a call, would take longer than a small kernel.
int64_t number(const py::tuple& numbers, int64_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(numbers.ptr(), i)); }
py::tuple part(const py::tuple& fields, int64_t i) {
  return py::reinterpret_borrow<py::tuple>(PyTuple_GET_ITEM(fields.ptr(), i));
}

// (pointer, dtype code, sizes, strides) with the class dimension at `class_dim`, or without one (-1); or None.
View view(const py::object& tensor, int class_dim, const Call& call) {
  View result{};
  if (tensor.is_none()) return result;
  const auto fields = py::reinterpret_borrow<py::tuple>(tensor);
  const auto sizes = part(fields, 2), strides = part(fields, 3);
  result.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(fields.ptr(), 0));
  result.dtype = DType(number(fields, 1));
  int d = 0;
  for (int i = 0; i < int(PyTuple_GET_SIZE(strides.ptr())); i++) {
    const bool is_class = i == class_dim;
    if (d >= MAX_DIMS || number(sizes, i) != (is_class ? call.C : call.dims.sizes[d]))
      refuse("sizes of input and target differ");
    (is_class ? result.class_stride : result.strides[d++]) = number(strides, i);
  }
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

double real(const py::tuple& numbers, int64_t i) { return PyFloat_AsDouble(PyTuple_GET_ITEM(numbers.ptr(), i)); }

// The first five fields of options.Options, in its order. torch reads a smoothing that is not above zero as none.
Options options_of(const py::tuple& fields) {
  const double e = real(fields, 1);
  const bool capped = PyTuple_GET_ITEM(fields.ptr(), 3) != Py_None;
  return {number(fields, 0), e > 0 ? e : 0, real(fields, 2), capped ? real(fields, 3) : 0, real(fields, 4)};
}

Reduction reduction_of(const py::tuple& options) {
  PyObject* const name = PyTuple_GET_ITEM(options.ptr(), 5);
  if (PyUnicode_CompareWithASCIIString(name, "mean") == 0) return Reduction::mean;
  return PyUnicode_CompareWithASCIIString(name, "sum") == 0 ? Reduction::sum : Reduction::none;
}

uintptr_t address(const py::tuple& addresses, int64_t i) {
  return reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(addresses.ptr(), i)));
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
    call.dims.sizes[call.dims.rank++] = number(sizes, i);
    call.rows *= number(sizes, i);
  }
  if (call.dims.rank == 0) call.dims.sizes[call.dims.rank++] = 1;
  if (call.C < 1) refuse("expected at least one class, got " + std::to_string(call.C));
  call.input = view(input, class_dim, call);
  call.probs = DType(number(target, 1)) < DType::int64;
  call.target = view(target, call.probs ? class_dim : -1, call);
  call.grad = view(grad, class_dim, call);
  call.d_target = view(d_target, class_dim, call);
  call.across = lanes_across_rows(call.C, call.input.class_stride, call.dims.rank);
  if (call.rows > 0) merge_dims(call);
  call.weight = reinterpret_cast<void*>(address(given, 2));
  call.options = options_of(options);
  if (PyErr_Occurred()) throw py::error_already_set();
  call.scale = 1;
  return call;
}

template <class Work> void run(const Call& call, Work work) {
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
  call.saved = reinterpret_cast<Saved*>(saved);
  call.stats = reinterpret_cast<Stats*>(stats);
  void* const out = reinterpret_cast<void*>(address(loss, 0));
  const DType dtype = DType(number(loss, 1));
  const Reduction reduction = reduction_of(options);
  run(call, [&] { return forward(call, reduction, num_items, out, dtype, threads); });
}

// upstream: (address of one for each row or 0, what multiplies them, address of those of lse or 0)
void backward_py(const py::tuple& given, const py::tuple& options, double num_items, const py::tuple& upstream,
                 const py::object& grad, const py::object& d_target, uintptr_t saved, int threads) {
  Call call = make_call(given, options, grad, d_target);
  call.upstream = reinterpret_cast<void*>(address(upstream, 0));
  call.scale = real(upstream, 1);
  call.g_lse = reinterpret_cast<void*>(address(upstream, 2));
  if (!saved && call.rows > 0) refuse("expected the rows that a forward call saved, got none");
  call.saved = reinterpret_cast<Saved*>(saved);
  const Reduction reduction = reduction_of(options);
  run(call, [&] { return backward(call, reduction, num_items, threads); });
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
  m.def("isa", [] { return isa().name; });
  m.def("isa_names", isa_names);
  m.def("set_isa", set_isa_py);
#ifdef __clang__
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
  m.attr("saved_size") = sizeof(Saved) / sizeof(double);
  m.attr("stats_size") = sizeof(Stats) / sizeof(double);
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
