// Python's way into the kernels: one call that checks, allocates, draws and steps, or returns None.
//
// None means "not a plain case", never "failed": the caller then checks the arguments in Python, in words, and either
// raises, takes the reference path, or calls again with trusted = true. So the checks with messages stand in one place.
#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "er_sde_step.h"

namespace py = pybind11;

namespace {

using ersde::DType;
using ersde::StepArgs;

constexpr int64_t kGrain = 32768;  // elements a thread takes at least: below, waking it costs more than it saves

bool dtype_of(const at::Tensor& t, DType& out) {
  switch (t.scalar_type()) {
    case at::kFloat: out = DType::float32; return true;
    case at::kDouble: out = DType::float64; return true;
    case at::kBFloat16: out = DType::bfloat16; return true;
    case at::kHalf: out = DType::float16; return true;
    default: return false;
  }
}

bool get_tensor(py::handle h, at::Tensor& out) {
  if (!THPVariable_Check(h.ptr())) return false;
  out = THPVariable_Unpack(h.ptr());
  return true;
}

// A plain strided tensor with memory of its own: not a subclass that dispatches to Python, not a functorch wrapper, not a
// lazy conjugate or negative, and not one whose gradient autograd would have to follow.
bool is_plain(const at::Tensor& t, bool grad_mode) {
  constexpr c10::DispatchKeySet wrapped({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchGradWrapper,
                                         c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::Conjugate, c10::DispatchKey::Negative});
  return t.layout() == at::kStrided && !t.key_set().has_any(wrapped) && !(grad_mode && t.requires_grad());
}

struct Inputs {
  at::Tensor x, out, noise;
  std::vector<at::Tensor> history;
};

// Fills sizes and strides, adjacent dimensions merged where every operand allows it. With portable noise the batch
// stays dimension 0 and the rest keeps its order, since the position in the sample counts; without, dimensions are ordered
// by the strides of x, so that channels_last is walked as it lies.
void set_shape(StepArgs& a, const Inputs& in, const std::vector<at::Tensor>& operands, at::IntArrayRef global_shape,
               at::IntArrayRef global_start) {
  const bool portable = a.noise == ersde::Noise::portable;
  const auto sizes = in.x.sizes();
  const int dims = (int)sizes.size();
  std::vector<int> order;
  for (int d = 0; d < dims; ++d) {
    if (sizes[d] != 1 || (portable && d == 0)) order.push_back(d);
  }
  if (!portable) {
    const auto strides = in.x.strides();
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return strides[i] > strides[j]; });
  }
  std::vector<int64_t> position(dims, 0);
  a.first_position = 0;
  if (portable) {
    int64_t stride = 1;
    for (int d = dims - 1; d >= 1; --d) {
      position[d] = stride;
      a.first_position += stride * (global_start.empty() ? 0 : global_start[d - 1]);
      stride *= global_shape.empty() ? sizes[d] : global_shape[d - 1];
    }
  }
  const int count = (int)operands.size();
  a.ndim = 0;
  for (int d : order) {
    const int last = a.ndim - 1;
    bool merges = a.ndim > (portable ? 1 : 0) && a.position_strides[last] == sizes[d] * position[d];
    for (int k = 0; merges && k < count; ++k) {
      const auto& o = k < a.num_terms ? a.terms[k] : a.out;
      merges = o.strides[last] == sizes[d] * operands[k].stride(d) * ersde::size_of(o.dtype);
    }
    const int at = merges ? last : a.ndim++;
    a.sizes[at] = merges ? a.sizes[at] * sizes[d] : sizes[d];
    a.position_strides[at] = position[d];
    for (int k = 0; k < count; ++k) {
      auto& o = k < a.num_terms ? a.terms[k] : a.out;
      o.strides[at] = operands[k].stride(d) * ersde::size_of(o.dtype);
    }
  }
  // Scalars get a dimension, and portable noise an inner one along which neighbours in the row are neighbours in the sample.
  while (a.ndim < 1 || (portable && (a.ndim < 2 || a.position_strides[a.ndim - 1] != 1))) {
    a.sizes[a.ndim] = 1;
    a.position_strides[a.ndim] = 1;
    for (int k = 0; k < count; ++k) {
      auto& o = k < a.num_terms ? a.terms[k] : a.out;
      o.strides[a.ndim] = ersde::size_of(o.dtype);
    }
    ++a.ndim;
  }
}

void run(const StepArgs& args) {
  if (args.numel <= kGrain || at::get_num_threads() == 1) {
    ersde::step_cpu(args, 0, args.numel);
    return;
  }
  py::gil_scoped_release release;
  at::parallel_for(0, args.numel, kGrain, [&](int64_t begin, int64_t end) { ersde::step_cpu(args, begin, end); });
}

// See fast_step in step.py for the arguments. seed: None, an int, or an int64 CPU tensor [batch, 2] of (seed, sample).
py::object step(const at::Tensor& weights, py::handle i, py::handle x, py::handle history, py::handle noise,
                py::handle generator, py::handle seed, int64_t first_step, py::handle out, bool trusted,
                const std::vector<int64_t>& global_shape, const std::vector<int64_t>& global_start) {
  if (!PyLong_Check(i.ptr())) return py::none();
  const int64_t row = PyLong_AsLongLong(i.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return py::none();
  }
  if (row < 0 || row >= weights.size(0)) return py::none();
  const int64_t order = weights.size(1) - 2;
  const double* w = weights.const_data_ptr<double>() + row * (order + 2);
  int64_t uses = order;
  while (uses > 0 && w[uses] == 0) --uses;
  const bool draws = w[order + 1] != 0;
  const bool grad_mode = c10::GradMode::is_enabled();

  Inputs in;
  StepArgs a;
  if (!get_tensor(x, in.x) || !dtype_of(in.x, a.out.dtype) || !in.x.is_cpu() || !is_plain(in.x, grad_mode)) return py::none();
  if (in.x.dim() >= ersde::kMaxDims) return py::none();
  if (!PyList_Check(history.ptr()) && !PyTuple_Check(history.ptr())) return py::none();
  if (PySequence_Fast_GET_SIZE(history.ptr()) < uses) return py::none();
  const auto is_operand = [&](const at::Tensor& t, DType& dtype) {
    return dtype_of(t, dtype) && t.sizes() == in.x.sizes() && t.is_cpu() && is_plain(t, grad_mode);
  };

  a.num_terms = 0;
  a.float64 = a.out.dtype == DType::float64;
  std::vector<at::Tensor> operands;
  operands.reserve(ersde::kMaxTerms + 1);
  const auto add_term = [&](const at::Tensor& t, double weight, DType dtype) {
    auto& term = a.terms[a.num_terms];
    term.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    term.dtype = dtype;
    a.weights[a.num_terms++] = weight;
    a.float64 |= dtype == DType::float64;
    operands.push_back(t);
  };
  if (w[0] != 0) add_term(in.x, w[0], a.out.dtype);
  for (int64_t k = 0; k < uses; ++k) {
    at::Tensor denoised;
    DType dtype;
    if (!get_tensor(PySequence_Fast_GET_ITEM(history.ptr(), k), denoised) || !is_operand(denoised, dtype)) return py::none();
    if (w[k + 1] != 0) add_term(denoised, w[k + 1], dtype);
  }

  if (!noise.is_none() + !generator.is_none() + !seed.is_none() > 1) return py::none();
  at::Tensor z, seeds;
  DType noise_dtype = a.out.dtype;
  a.noise = ersde::Noise::none;
  a.w_noise = w[order + 1];
  a.seeds = nullptr;
  if (!noise.is_none() && (!get_tensor(noise, z) || !is_operand(z, noise_dtype))) return py::none();
  std::optional<at::Generator> torch_generator;
  if (!generator.is_none()) {
    if (!THPGenerator_Check(generator.ptr())) return py::none();
    torch_generator = py::cast<at::Generator>(generator);
    if (torch_generator->device() != in.x.device()) return py::none();
  }
  if (!seed.is_none()) {
    a.step = (uint32_t)(first_step + row);
    if (PyLong_Check(seed.ptr()) && !PyBool_Check(seed.ptr())) {
      a.seed = PyLong_AsUnsignedLongLongMask(seed.ptr());
    } else if (!get_tensor(seed, seeds)) {
      return py::none();
    } else {
      a.seeds = seeds.const_data_ptr<int64_t>();
    }
    if (draws) a.noise = ersde::Noise::portable;
  }

  if (out.is_none()) {
    in.out = at::empty_like(in.x);
  } else {
    DType out_dtype;
    if (!get_tensor(out, in.out) || !is_operand(in.out, out_dtype) || out_dtype != a.out.dtype) return py::none();
    if (!trusted) {
      if (at::has_internal_overlap(in.out) != at::MemOverlap::No) return py::none();
      if (draws && z.defined()) operands.push_back(z);
      for (const auto& t : operands) {
        const auto status = at::get_overlap_status(in.out, t);
        if (status != at::MemOverlapStatus::No && status != at::MemOverlapStatus::Full) return py::none();
        if (status == at::MemOverlapStatus::Full && in.out.strides() != t.strides()) return py::none();
      }
      if (draws && z.defined()) operands.pop_back();
    }
  }
  a.numel = in.out.numel();
  const auto result = [&] { return out.is_none() ? py::cast(in.out) : py::reinterpret_borrow<py::object>(out); };
  if (a.numel == 0) return result();

  if (draws && a.noise == ersde::Noise::none) {
    if (!z.defined()) z = at::randn(in.x.sizes(), torch_generator, in.x.options().requires_grad(false));
    add_term(z, a.w_noise, noise_dtype);
  }
  operands.push_back(in.out);
  a.out.data = static_cast<char*>(in.out.mutable_data_ptr());
  set_shape(a, in, operands, global_shape, global_start);
  run(a);
  return result();
}

// Fills a contiguous float32 CPU tensor [batch, ...] with the portable stream.
void portable_noise(const at::Tensor& out, const at::Tensor& seeds, int64_t step) {
  const int64_t batch = seeds.size(0), size = out.numel() / std::max<int64_t>(batch, 1);
  float* data = out.mutable_data_ptr<float>();
  const int64_t* table = seeds.const_data_ptr<int64_t>();
  py::gil_scoped_release release;
  at::parallel_for(0, batch * size, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / size, n = std::min(end, (b + 1) * size) - begin;
      ersde::portable_noise_cpu(data + begin, table[2 * b], (uint32_t)step, table[2 * b + 1], begin - b * size, n);
      begin += n;
    }
  });
}

// Normals [2, n] of words a, b: int64 CPU tensors [n] that hold 32 bits.
at::Tensor box_muller(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor words = at::stack({a, b}).to(at::kUInt32).contiguous();
  at::Tensor out = at::empty({2, a.size(0)}, at::kFloat);
  const auto* w = static_cast<const uint32_t*>(words.const_data_ptr());
  ersde::box_muller_cpu(w, w + a.size(0), out.mutable_data_ptr<float>(), out.mutable_data_ptr<float>() + a.size(0), a.size(0));
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("step", &step);
  m.def("portable_noise", &portable_noise);
  m.def("box_muller", &box_muller);
  m.def("instruction_set", &ersde::instruction_set_name);
  m.def("use_instruction_set", [](int set) { return ersde::use_instruction_set(static_cast<ersde::InstructionSet>(set)); });
}
