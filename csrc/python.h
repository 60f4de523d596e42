// Python's limited API, so that one module serves Python 3.10 and whatever comes after it, and the little that every
// use of it needs. setup.py says which API: a Python without the GIL has no limited one.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <string>

namespace fused_ce::python {

// Thrown where Python's own error is set already.
struct Raised {};

[[noreturn]] void raise(PyObject* type, const std::string& message);
[[noreturn]] void refuse(const std::string& message);  // raises a ValueError

// A reference of its own.
class Owned {
 public:
  explicit Owned(PyObject* from) : object(from) {
    if (!from) throw Raised();
  }
  Owned(const Owned&) = delete;
  ~Owned() { Py_DECREF(object); }
  PyObject* get() const { return object; }
  PyObject* another() const {
    Py_INCREF(object);
    return object;
  }

 private:
  PyObject* const object;
};

// Other threads run Python as long as one lives.
class WithoutGil {
 public:
  WithoutGil() : state(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(state); }

 private:
  PyThreadState* const state;
};

// Of a tuple.
PyObject* item(PyObject* fields, Py_ssize_t i);
int64_t number(PyObject* from);
double real(PyObject* from);
bool is_true(PyObject* answer);

}  // namespace fused_ce::python
