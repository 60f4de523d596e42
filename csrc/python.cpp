#include "python.h"

namespace fused_ce::python {

void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw Raised();
}

void refuse(const std::string& message) { raise(PyExc_ValueError, message); }

PyObject* item(PyObject* fields, Py_ssize_t i) {
  if (!PyTuple_Check(fields) || i >= PyTuple_Size(fields))
    refuse("expected a tuple with an item " + std::to_string(i) + "; see _C.pyi");
  return PyTuple_GetItem(fields, i);
}

int64_t number(PyObject* from) {
  const int64_t value = PyLong_AsLongLong(from);
  if (value == -1 && PyErr_Occurred()) throw Raised();
  return value;
}

double real(PyObject* from) {
  const double value = PyFloat_AsDouble(from);
  if (value == -1 && PyErr_Occurred()) throw Raised();
  return value;
}

bool is_true(PyObject* answer) {
  const int truth = PyObject_IsTrue(answer);
  if (truth < 0) throw Raised();
  return truth;
}

}  // namespace fused_ce::python
