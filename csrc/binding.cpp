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

#ifdef ERSDE_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGuard.h>
#endif

#include <algorithm>
#include <array>
#include <limits>
#include <mutex>

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

// Sizes, and strides of every operand (the terms, then out), adjacent dimensions merged where all allow it. A drawn stream
// counts positions, so the order of the dimensions is kept; with the portable one the batch also stays dimension 0. Otherwise
// dimensions are ordered by the strides of out, so that channels_last is walked as it lies.
void set_shape(StepArgs& a, const std::vector<at::Tensor>& operands, at::IntArrayRef global_shape, at::IntArrayRef global_start) {
  const bool portable = a.noise == ersde::Noise::portable;
  const auto sizes = operands.back().sizes();
  const int dims = (int)sizes.size(), count = (int)operands.size();
  std::array<int, ersde::kMaxDims> order{};
  int kept = 0;
  for (int d = 0; d < dims; ++d) {
    if (sizes[d] != 1 || (portable && d == 0)) order[kept++] = d;
  }
  if (a.noise == ersde::Noise::none) {
    const auto strides = operands.back().strides();
    std::stable_sort(order.begin(), order.begin() + kept, [&](int i, int j) { return strides[i] > strides[j]; });
  }
  std::array<int64_t, ersde::kMaxDims> position{};
  a.first_position = 0;
  if (portable) {
    int64_t stride = 1;
    for (int d = dims - 1; d >= 1; --d) {
      position[d] = stride;
      a.first_position += stride * (global_start.empty() ? 0 : global_start[d - 1]);
      stride *= global_shape.empty() ? sizes[d] : global_shape[d - 1];
    }
  }
  const auto operand = [&](int k) -> ersde::Operand& { return k < count - 1 ? a.terms[k] : a.out; };
  a.ndim = 0;
  for (int n = 0; n < kept; ++n) {
    const int d = order[n], last = a.ndim - 1;
    bool merges = a.ndim > (portable ? 1 : 0) && a.position_strides[last] == sizes[d] * position[d];
    for (int k = 0; merges && k < count; ++k) {
      merges = operand(k).strides[last] == sizes[d] * operands[k].stride(d) * ersde::size_of(operand(k).dtype);
    }
    const int at = merges ? last : a.ndim++;
    a.sizes[at] = merges ? a.sizes[at] * sizes[d] : sizes[d];
    a.position_strides[at] = position[d];
    for (int k = 0; k < count; ++k) operand(k).strides[at] = operands[k].stride(d) * ersde::size_of(operand(k).dtype);
  }
  // Scalars get a dimension, and portable noise an inner one along which neighbours in the row are neighbours in the sample.
  while (a.ndim < 1 || (portable && (a.ndim < 2 || a.position_strides[a.ndim - 1] != 1))) {
    a.sizes[a.ndim] = 1;
    a.position_strides[a.ndim] = 1;
    for (int k = 0; k < count; ++k) operand(k).strides[a.ndim] = ersde::size_of(operand(k).dtype);
    ++a.ndim;
  }
}

void run(const StepArgs& args, const at::Device& device) {
#ifdef ERSDE_WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    const char* error = ersde::step_cuda(args, at::cuda::getCurrentDeviceProperties()->multiProcessorCount,
                                         at::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(error == nullptr, "ersde_fast: the CUDA kernel could not be launched: ", error);
    return;
  }
#endif
  if (args.numel <= kGrain || at::get_num_threads() == 1) {
    ersde::step_cpu(args, 0, args.numel);
    return;
  }
  py::gil_scoped_release release;
  at::parallel_for(0, args.numel, kGrain, [&](int64_t begin, int64_t end) { ersde::step_cpu(args, begin, end); });
}

// ---- torch's stream on CUDA devices ----

enum class TorchStream : int { unchecked, as_here, otherwise };
std::array<TorchStream, 64> torch_stream_of_device{};  // written by Python once for each device, under the GIL

// Threads that torch.randn runs for n elements on a card, and how far it advances the generator's offset.
int64_t torch_threads(int64_t n, int64_t multiprocessors, int64_t threads_each) {
  return 256 * std::min((n + 255) / 256, multiprocessors * (threads_each / 256));
}
uint64_t torch_advance(int64_t n, int64_t threads, DType dtype) {
  const int64_t unroll = dtype == DType::float64 ? 2 : 4;
  return (uint64_t)((n - 1) / (threads * unroll) + 1) * 4;
}

#ifdef ERSDE_WITH_CUDA
// Torch draws tensors that 32-bit byte offsets do not reach in pieces: those are left to torch.
bool torch_draws_in_one_piece(const at::Tensor& x) {
  return 1 + (x.numel() - 1) * (int64_t)x.element_size() <= std::numeric_limits<int32_t>::max();
}

// Takes the numbers that torch.randn would draw for x from the generator, as torch's own kernels do.
void take_torch_stream(StepArgs& a, const at::Tensor& x, const std::optional<at::Generator>& generator, int64_t multiprocessors,
                       int64_t threads_each) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto* properties = at::cuda::getCurrentDeviceProperties();
  if (multiprocessors == 0) {
    multiprocessors = properties->multiProcessorCount;
    threads_each = properties->maxThreadsPerMultiProcessor;
  }
  a.torch_threads = torch_threads(x.numel(), multiprocessors, threads_each);
  auto* g = at::get_generator_or_default<at::CUDAGeneratorImpl>(generator, at::cuda::detail::getDefaultCUDAGenerator(x.get_device()));
  at::PhiloxCudaState state;
  {
    const std::lock_guard<std::mutex> lock(g->mutex_);
    state = g->philox_cuda_state(torch_advance(x.numel(), a.torch_threads, a.out.dtype));
  }
  if (state.captured_) {
    a.torch_seed_pointer = reinterpret_cast<const int64_t*>(state.seed_.ptr);
    a.torch_offset_pointer = reinterpret_cast<const int64_t*>(state.offset_.ptr);
    a.torch_offset = state.offset_intragraph_;
  } else {
    a.seed = state.seed_.val;
    a.torch_offset = state.offset_.val;
  }
  a.noise = ersde::Noise::torch;
}
#endif

bool is_here(const at::Device& device) {
#ifdef ERSDE_WITH_CUDA
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu();
}

bool set_seeds(StepArgs& a, py::handle seed, const at::Device& device, at::Tensor& table) {
  if (PyLong_Check(seed.ptr()) && !PyBool_Check(seed.ptr())) {
    a.seed = PyLong_AsUnsignedLongLongMask(seed.ptr());
    return true;
  }
  if (!get_tensor(seed, table)) return false;
  table = table.to(device, /*non_blocking=*/true).contiguous();
  a.seeds = table.const_data_ptr<int64_t>();
  return true;
}

// See fast_step in step.py for the arguments. seed: None, an int, or an int64 tensor [batch, 2] of (seed, sample).
// i: a number, and weights a float64 CPU table; or both in the device memory of x, so that a captured graph reads them anew.
py::object step(const at::Tensor& weights, py::handle i, py::handle x_object, py::handle history, py::handle noise,
                py::handle generator, py::handle seed, int64_t first_step, py::handle out_object, bool trusted,
                const std::vector<int64_t>& global_shape, const std::vector<int64_t>& global_start,
                const std::vector<int64_t>& torch_layout) {
  StepArgs a{};
  at::Tensor x, z, out, seeds, device_row;
  const bool grad_mode = c10::GradMode::is_enabled();
  if (!get_tensor(x_object, x) || !dtype_of(x, a.out.dtype) || !is_here(x.device()) || !is_plain(x, grad_mode)) return py::none();
  if (x.dim() >= ersde::kMaxDims) return py::none();
  const auto is_operand = [&](const at::Tensor& t, DType& dtype) {
    return dtype_of(t, dtype) && t.sizes() == x.sizes() && t.device() == x.device() && is_plain(t, grad_mode);
  };

  const int64_t order = weights.size(1) - 2;
  int64_t uses = order, row = 0;
  const double* w = nullptr;
  if (PyLong_Check(i.ptr())) {
    row = PyLong_AsLongLong(i.ptr());
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return py::none();
    }
    if (row < 0 || row >= weights.size(0) || !weights.is_cpu()) return py::none();
    w = weights.const_data_ptr<double>() + row * (order + 2);
    while (uses > 0 && w[uses] == 0) --uses;
  } else {
    if (!get_tensor(i, device_row) || device_row.scalar_type() != at::kLong || device_row.device() != x.device()) return py::none();
    if (weights.device() != x.device() || !x.is_cuda()) return py::none();
    a.table = weights.const_data_ptr<double>();
    a.row = device_row.const_data_ptr<int64_t>();
    a.num_columns = (int)order + 2;
  }
  const bool draws = !w || w[order + 1] != 0;
  if (!PyList_Check(history.ptr()) && !PyTuple_Check(history.ptr())) return py::none();
  if (PySequence_Fast_GET_SIZE(history.ptr()) < uses) return py::none();

  a.float64 = a.out.dtype == DType::float64;
  std::vector<at::Tensor> operands;
  operands.reserve(ersde::kMaxTerms + 1);
  const auto add_term = [&](const at::Tensor& t, int column, DType dtype) {
    if (w && w[column] == 0) return;
    auto& term = a.terms[a.num_terms];
    term.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    term.dtype = dtype;
    a.weights[a.num_terms] = w ? w[column] : 0;
    a.columns[a.num_terms++] = column;
    a.float64 |= dtype == DType::float64;
    operands.push_back(t);
  };
  add_term(x, 0, a.out.dtype);
  for (int k = 0; k < uses; ++k) {
    at::Tensor denoised;
    DType dtype;
    if (!get_tensor(PySequence_Fast_GET_ITEM(history.ptr(), k), denoised) || !is_operand(denoised, dtype)) return py::none();
    add_term(denoised, k + 1, dtype);
  }

  if (!noise.is_none() + !generator.is_none() + !seed.is_none() > 1) return py::none();
  if (!noise.is_none()) {
    DType dtype;
    if (!get_tensor(noise, z) || !is_operand(z, dtype)) return py::none();
    add_term(z, (int)order + 1, dtype);
  }
  std::optional<at::Generator> torch_generator;
  if (!generator.is_none()) {
    if (!THPGenerator_Check(generator.ptr())) return py::none();
    torch_generator = py::cast<at::Generator>(generator);
    const at::Device on = torch_generator->device();  // its index may be left open
    if (on.type() != x.device().type() || (on.has_index() && x.device().has_index() && on != x.device())) return py::none();
  }
  if (!seed.is_none() && !set_seeds(a, seed, x.device(), seeds)) return py::none();

  if (out_object.is_none()) {
    out = at::empty_like(x);
  } else {
    DType out_dtype;
    if (!get_tensor(out_object, out) || !is_operand(out, out_dtype) || out_dtype != a.out.dtype) return py::none();
    if (!trusted) {
      if (at::has_internal_overlap(out) != at::MemOverlap::No) return py::none();
      for (const auto& t : operands) {
        const auto status = at::get_overlap_status(out, t);
        if (status != at::MemOverlapStatus::No && status != at::MemOverlapStatus::Full) return py::none();
        if (status == at::MemOverlapStatus::Full && (out.strides() != t.strides() || out.scalar_type() != t.scalar_type())) {
          return py::none();
        }
      }
    }
  }
  const auto result = [&] { return out_object.is_none() ? py::cast(out) : py::reinterpret_borrow<py::object>(out_object); };
  a.numel = out.numel();
  if (a.numel == 0) return result();

  if (draws && !z.defined()) {
    a.w_noise = w ? w[order + 1] : 0;
    if (!seed.is_none()) {
      a.noise = ersde::Noise::portable;
      a.step = (uint32_t)(first_step + row);
    } else {
#ifdef ERSDE_WITH_CUDA
      if (x.is_cuda() && (!torch_layout.empty() || torch_draws_in_one_piece(x))) {
        const auto stream = torch_stream_of_device[x.get_device()];
        if (stream == TorchStream::unchecked) return py::none();
        if (stream == TorchStream::as_here) {
          take_torch_stream(a, x, torch_generator, torch_layout.empty() ? 0 : torch_layout[0], torch_layout.empty() ? 0 : torch_layout[1]);
        }
      }
#endif
      if (a.noise == ersde::Noise::none) {
        z = at::randn(x.sizes(), torch_generator, x.options().requires_grad(false));
        add_term(z, (int)order + 1, a.out.dtype);
      }
    }
  }
  operands.push_back(out);
  a.out.data = static_cast<char*>(out.mutable_data_ptr());
  set_shape(a, operands, global_shape, global_start);
  run(a, x.device());
  return result();
}

// out = the noise alone: a step without terms.
StepArgs noise_alone(const at::Tensor& out) {
  StepArgs a{};
  TORCH_CHECK(dtype_of(out, a.out.dtype) && out.is_contiguous(), "out must be a contiguous tensor of a supported dtype");
  a.out.data = static_cast<char*>(out.mutable_data_ptr());
  a.numel = out.numel();
  a.float64 = a.out.dtype == DType::float64;
  a.w_noise = 1;
  // A term of weight 0, which is not read, so that the kernels for one term serve.
  a.num_terms = 1;
  a.terms[0].data = a.out.data;
  a.terms[0].dtype = a.out.dtype;
  return a;
}

// Fills a contiguous tensor [batch, ...] with the portable stream.
void portable_noise(const at::Tensor& out, py::handle seed, int64_t step) {
  StepArgs a = noise_alone(out);
  at::Tensor seeds;
  if (a.numel == 0) return;
  TORCH_CHECK(set_seeds(a, seed, out.device(), seeds), "seed must be a number or an int64 tensor");
  a.noise = ersde::Noise::portable;
  a.step = (uint32_t)step;
  set_shape(a, {out, out}, {}, {});
  run(a, out.device());
}

// Fills a contiguous tensor with what torch.randn draws on a CUDA card of that layout under this seed and offset; returns by
// how much the offset grows.
int64_t torch_noise(const at::Tensor& out, py::handle seed, int64_t offset, int64_t multiprocessors, int64_t threads_each) {
  StepArgs a = noise_alone(out);
  if (a.numel == 0) return 0;
  a.torch_threads = torch_threads(a.numel, multiprocessors, threads_each);
  a.seed = PyLong_AsUnsignedLongLongMask(seed.ptr());
  a.torch_offset = (uint64_t)offset;
  const int64_t grows = (int64_t)torch_advance(a.numel, a.torch_threads, a.out.dtype);
  if (out.is_cpu()) {
    float* data = out.mutable_data_ptr<float>();
    py::gil_scoped_release release;
    at::parallel_for(0, a.numel, kGrain, [&](int64_t begin, int64_t end) {
      ersde::torch_noise_cpu(data + begin, a.seed, a.torch_offset, a.torch_threads, begin, end - begin);
    });
    return grows;
  }
  a.noise = ersde::Noise::torch;
  set_shape(a, {out, out}, {}, {});
  run(a, out.device());
  return grows;
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
#ifdef ERSDE_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("step", &step);
  m.def("portable_noise", &portable_noise);
  m.def("torch_noise", &torch_noise);
  m.def("torch_stream", [](int device) { return (int)torch_stream_of_device.at(device); });
  m.def("set_torch_stream", [](int device, bool as_here) {
    torch_stream_of_device.at(device) = as_here ? TorchStream::as_here : TorchStream::otherwise;
  });
  m.def("box_muller", &box_muller);
  m.def("instruction_set", &ersde::instruction_set_name);
  m.def("use_instruction_set", [](int set) { return ersde::use_instruction_set(static_cast<ersde::InstructionSet>(set)); });
}
