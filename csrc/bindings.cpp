// What Python calls: releases the GIL, raises for a bad target, hands tensors of the pool over.
#include <pybind11/pybind11.h>

#include <string>

#include "arguments.h"
#include "dispatch.h"
#include "dlpack.h"
#include "memory.h"
#include "tensors.h"

namespace py = pybind11;
using namespace fused_ce;
using namespace fused_ce::arguments;

namespace {

// Below this many logits the work is shorter than handing the GIL over and back.
constexpr int64_t KEEP_GIL = 4096;

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
  constexpr int64_t FIELDS = sizeof(Stats) / sizeof(double);
  call.stats = static_cast<Stats*>(tensors::elements(given[9], FIELDS * call.rows, DType::float64));
  call.wants_stats = call.stats;
  call.saved = saved_of(given[8], call);
  return run(call, given[10], [&](int threads) { return forward(call, reduction, num_items, loss, dtype, threads); });
}

// input, target, weight, options, num_items, upstream, scale, upstream of lse and of the entropy, grad, gradient of
// target, saved, threads
PyObject* backward_py(Arguments given) {
  Call call = make_call(given[0], given[1], given[2], given[3], given[9], given[10]);
  if (given[9] == Py_None) refuse("expected where to write the gradient, got None");
  if (given[11] == Py_None) refuse("expected the rows that a forward call saved, got none");
  const Reduction reduction = reduction_of(given[3]);
  const double num_items = real(given[4]);
  call.upstream = tensors::elements(given[5], call.rows, acc_of(call));
  call.scale = real(given[6]);
  call.g_lse = tensors::elements(given[7], call.rows, acc_of(call));
  call.g_entropy = tensors::elements(given[8], call.rows, acc_of(call));
  call.wants_stats = call.g_entropy;
  call.saved = saved_of(given[11], call);
  return run(call, given[12], [&](int threads) { return backward(call, reduction, num_items, threads); });
}

// input, target, weight, options, sums, threads
PyObject* part_py(Arguments given) {
  const Call call = shard_call(given[0], given[1], given[2], given[3], Py_None, given[4]);
  return run(call, given[5], [&](int threads) { return of_shard(call, threads); });
}

// input, target, weight, options, sums, upstream, scale, upstream of lse and of the entropy, grad, threads
PyObject* finish_py(Arguments given) {
  if (given[9] == Py_None) refuse("expected where to write the gradient, got None");
  Call call = shard_call(given[0], given[1], given[2], given[3], given[9], given[4]);
  call.upstream = tensors::elements(given[5], call.rows, acc_of(call));
  call.scale = real(given[6]);
  call.g_lse = tensors::elements(given[7], call.rows, acc_of(call));
  call.g_entropy = tensors::elements(given[8], call.rows, acc_of(call));
  return run(call, given[10], [&](int threads) { return of_shard(call, threads); });
}

// call, watchers, watchers of 16 bits
PyObject* is_common_py(Arguments given) { return PyBool_FromLong(tensors::is_common(given[0], given[1], given[2])); }

PyMethodDef FAST[] = {
    {"is_common", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called<is_common_py, 3>)), METH_FASTCALL,
     ""},
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called<forward_py, 11>)), METH_FASTCALL, ""},
    {"part", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called<part_py, 6>)), METH_FASTCALL, ""},
    {"finish", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called<finish_py, 11>)), METH_FASTCALL, ""},
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called<backward_py, 13>)), METH_FASTCALL,
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
