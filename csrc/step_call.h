// How Python calls the step: which arguments there are, and their way out of a vector call.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <string>

namespace {

namespace py = pybind11;

// What `step` is called with: four arguments by position, the others by keyword. See fast_step in step.py and StepRequest in
// request.py for them.
struct StepCall {
  py::handle table;  // of the plan, [num_steps, columns], or of several, [num_plans, ...], float64
  py::handle i, x, history;
  py::handle noise = Py_None, generator = Py_None, seed = Py_None;  // seed: an int, or an int64 tensor [batch, 2] of (seed, sample)
  py::handle draws = Py_False;                                     // whether any row adds noise
  py::handle predicts = Py_False;                                  // whether history[0] is a model's output
  py::handle unconditional = Py_None, scale = Py_None;             // scale: a number, or a float64 tensor [batch]
  py::handle cfg_pp = Py_False;                                    // whether the row may weigh the unconditional output too
  py::handle out = Py_None, ring = Py_None;
  py::handle global_shape = Py_None, global_start = Py_None, torch_layout = Py_None;
  py::handle reduction = Py_None;  // "sum" or "mean": the log-density too, over the elements of a sample
  py::handle x_next = Py_None;     // the log-density alone, of this sample
  py::handle gradient = Py_None, gradients = Py_None;  // of it: float64 [batch], and tensors to write, or None: with respect to x, the history, the
                                                      // unconditional output, x_next
  py::handle trusted = Py_False;  // whether the arguments have been checked, by a caller that is autograd's own where it matters
};

struct StepKeyword {
  const char* name;
  py::handle StepCall::*argument;
  PyObject* interned;
};
// In the order in which fast_step passes them.
StepKeyword kStepKeywords[] = {
    {"noise", &StepCall::noise, nullptr},
    {"generator", &StepCall::generator, nullptr},
    {"seed", &StepCall::seed, nullptr},
    {"draws", &StepCall::draws, nullptr},
    {"out", &StepCall::out, nullptr},
    {"predicts", &StepCall::predicts, nullptr},
    {"unconditional", &StepCall::unconditional, nullptr},
    {"scale", &StepCall::scale, nullptr},
    {"cfg_pp", &StepCall::cfg_pp, nullptr},
    {"ring", &StepCall::ring, nullptr},
    {"global_shape", &StepCall::global_shape, nullptr},
    {"global_start", &StepCall::global_start, nullptr},
    {"torch_layout", &StepCall::torch_layout, nullptr},
    {"trusted", &StepCall::trusted, nullptr},
    {"reduction", &StepCall::reduction, nullptr},
    {"x_next", &StepCall::x_next, nullptr},
    {"gradient", &StepCall::gradient, nullptr},
    {"gradients", &StepCall::gradients, nullptr},
};

// Keywords are compared by their address first, which is that of the interned name.
inline void intern_keywords() {
  for (StepKeyword& keyword : kStepKeywords) keyword.interned = PyUnicode_InternFromString(keyword.name);
}

inline StepCall call_of(PyObject* const* given, Py_ssize_t by_position, PyObject* keywords) {
  TORCH_CHECK_TYPE(by_position == 4, "step takes 4 arguments by position, got ", by_position);
  StepCall call{given[0], given[1], given[2], given[3]};
  constexpr size_t known = std::size(kStepKeywords);
  size_t next = 0;  // of who keeps to that order the first name compared is the one
  for (Py_ssize_t k = 0; k < (keywords ? PyTuple_GET_SIZE(keywords) : 0); ++k) {
    PyObject* name = PyTuple_GET_ITEM(keywords, k);
    size_t tried = 0;
    const auto is_named = [&](const StepKeyword& keyword) {
      return keyword.interned == name || PyUnicode_CompareWithASCIIString(name, keyword.name) == 0;
    };
    while (tried < known && !is_named(kStepKeywords[next])) {
      next = (next + 1) % known;
      ++tried;
    }
    TORCH_CHECK_TYPE(tried < known, "step has no argument ", py::str(name).cast<std::string>());
    call.*kStepKeywords[next].argument = given[by_position + k];
    next = (next + 1) % known;
  }
  return call;
}

}  // namespace
