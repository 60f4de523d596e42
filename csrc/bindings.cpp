// What Python calls: releases the GIL, raises for a bad target, hands tensors of the pool over.
#include "arguments.h"
#include "dispatch.h"
#include "dlpack.h"
#include "memory.h"
#include "python.h"
#include "tensors.h"

using namespace fused_ce;
using namespace fused_ce::arguments;
using namespace fused_ce::python;

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
    const WithoutGil others;
    refusal = work(int(count));
  }
  if (refusal.bad) raise(PyExc_IndexError, "Target " + std::to_string(refusal.target) + " is out of bounds.");
  Py_RETURN_NONE;
}

// Of a function that Python calls.
using Arguments = PyObject* const*;

template <PyObject* (*Body)(Arguments), int Count> PyObject* called(PyObject*, Arguments given, Py_ssize_t count) {
  try {
    if (count != Count)
      raise(PyExc_TypeError,
            "expected " + std::to_string(Count) + " arguments, got " + std::to_string(count) + "; see _C.pyi");
    return Body(given);
  } catch (const Raised&) {
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

PyObject* meet_py(Arguments given) {
  tensors::meet(given[0], given[1]);
  Py_RETURN_NONE;
}

// Both are contract.RowSums, of numbers. sums, after, probs
PyObject* combine_py(Arguments given) {
  double numbers[8], more[8];
  for (int i = 0; i < 8; i++) numbers[i] = real(item(given[0], i)), more[i] = real(item(given[1], i));
  isa().combine(numbers, more, is_true(given[2]));
  return Py_BuildValue("(dddddddd)", numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6],
                       numbers[7]);
}

// Who takes the tensor renames the capsule, and calls the deleter himself.
constexpr const char* UNTAKEN = "dltensor";

// A capsule for torch's from_dlpack; None where the pool does not serve. sizes, dtype
PyObject* empty_py(Arguments given) {
  const Py_ssize_t dims = PyTuple_Check(given[0]) ? PyTuple_Size(given[0]) : -1;
  if (dims < 0 || dims > MAX_DIMS) refuse("expected a tuple of at most " + std::to_string(MAX_DIMS) + " sizes");
  const int64_t dtype = number(given[1]);
  if (dtype < 0 || dtype > int64_t(DType::uint8)) refuse("expected a dtype from 0 to 5, got " + std::to_string(dtype));
  int64_t wanted[MAX_DIMS];
  for (Py_ssize_t d = 0; d < dims; d++) {
    wanted[d] = number(item(given[0], d));
    if (wanted[d] < 0) refuse("expected sizes from 0 on, got " + std::to_string(wanted[d]));
  }
  dlpack::ManagedTensor* made;
  {
    const WithoutGil others;  // unmapping what is in the way takes some time
    made = dlpack::make(wanted, int(dims), DType(dtype));
  }
  if (!made) Py_RETURN_NONE;
  PyObject* const capsule = PyCapsule_New(made, UNTAKEN, [](PyObject* self) {
    if (!PyCapsule_IsValid(self, UNTAKEN)) return;
    auto* const untaken = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(self, UNTAKEN));
    untaken->deleter(untaken);
  });
  if (!capsule) made->deleter(made);
  return capsule;
}

PyObject* keep_at_most_py(Arguments given) {
  memory::keep_at_most(number(given[0]));
  Py_RETURN_NONE;
}

PyObject* empty_cache_py(Arguments) {
  {
    const WithoutGil others;
    memory::empty_cache();
  }
  Py_RETURN_NONE;
}

PyObject* held_py(Arguments) {
  const memory::Held held = memory::held();
  return Py_BuildValue("(LL)", static_cast<long long>(held.used), static_cast<long long>(held.idle));
}

PyObject* isa_py(Arguments) { return PyUnicode_FromString(isa().name); }

PyObject* isa_names_py(Arguments) {
  const Owned names(PyList_New(0));
  int count;
  const Isa* all = isas(&count);
  for (int i = 0; i < count; i++) {
    if (!all[i].runs_here()) continue;
    if (PyList_Append(names.get(), Owned(PyUnicode_FromString(all[i].name)).get())) throw Raised();
  }
  return names.another();
}

PyObject* set_isa_py(Arguments given) {
  const char* const name = PyUnicode_AsUTF8AndSize(given[0], nullptr);
  if (!name) throw Raised();
  if (set_isa(name)) Py_RETURN_NONE;
  PyErr_Format(PyExc_ValueError, "instruction set must be one of %R, got %R; unset FUSED_CE_ISA to take the best",
               Owned(isa_names_py(nullptr)).get(), given[0]);
  throw Raised();
}

template <PyObject* (*Body)(Arguments), int Count> PyMethodDef function(const char* name) {
  const auto as_c = reinterpret_cast<void (*)()>(called<Body, Count>);  // the cast through it silences compilers
  return {name, reinterpret_cast<PyCFunction>(as_c), METH_FASTCALL, ""};
}

PyMethodDef FUNCTIONS[] = {function<forward_py, 11>("forward"),
                           function<backward_py, 13>("backward"),
                           function<part_py, 6>("part"),
                           function<finish_py, 11>("finish"),
                           function<is_common_py, 3>("is_common"),
                           function<meet_py, 2>("meet"),
                           function<combine_py, 3>("combine"),
                           function<empty_py, 2>("empty"),
                           function<keep_at_most_py, 1>("keep_at_most"),
                           function<empty_cache_py, 0>("empty_cache"),
                           function<held_py, 0>("held"),
                           function<isa_py, 0>("isa"),
                           function<isa_names_py, 0>("isa_names"),
                           function<set_isa_py, 1>("set_isa"),
                           {}};

#ifdef __clang__
constexpr const char* COMPILER = "clang " __clang_version__;
#else
constexpr const char* COMPILER = "g++ " __VERSION__;
#endif
#ifdef _OPENMP
constexpr bool OPENMP = true;
#else
constexpr bool OPENMP = false;
#endif

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_C", "", -1, FUNCTIONS, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// Its state is the process's, so that interpreters of their own may not have it: one phase.
PyMODINIT_FUNC PyInit__C() {
  PyObject* const module = PyModule_Create(&MODULE);
  if (!module) return nullptr;
#ifdef Py_GIL_DISABLED
  PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  const bool failed = PyModule_AddStringConstant(module, "compiler", COMPILER) ||
                      PyModule_AddIntConstant(module, "few_classes", FEW_CLASSES) ||
                      PyModule_AddIntConstant(module, "stats_size", sizeof(Stats) / sizeof(double)) ||
                      PyModule_AddObjectRef(module, "openmp", OPENMP ? Py_True : Py_False);
  if (!failed) return module;
  Py_DECREF(module);
  return nullptr;
}
