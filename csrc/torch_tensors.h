// Torch's tensors as kernels see them: which are plain, the memory of results, and on what device and in which threads kernels run.
#pragma once
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#ifdef ERSDE_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#endif

#include "er_sde_prepare.h"

namespace py = pybind11;

namespace {

using ersde::DType;
using ersde::StepArgs;
using ersde::torch_advance;
using ersde::torch_threads;

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

// The tensor of a Python object, which owns it; nullptr where it is something else.
const at::Tensor* tensor_of(py::handle h) { return THPVariable_Check(h.ptr()) ? &THPVariable_Unpack(h.ptr()) : nullptr; }

// A plain strided tensor with memory of its own: not a subclass that dispatches to Python, not a functorch wrapper, not a
// lazy conjugate or negative, nor zeros without memory, as tangents may be.
bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet wrapped({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchGradWrapper,
                                         c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::Conjugate, c10::DispatchKey::Negative,
                                         c10::DispatchKey::ZeroTensor});
  return t.layout() == at::kStrided && !t.key_set().has_any(wrapped);
}

// Whether autograd would have to follow it: a gradient or a tangent. Of no interest to a caller that is autograd's own.
bool is_differentiated(const at::Tensor& t, bool grad_mode) {
  return (grad_mode && t.requires_grad()) || t._fw_grad(/*level=*/0).defined();
}

// Whether a mode of Python or TorchScript's tracer wants to see every operator.
bool is_traced() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::PreDispatch) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer);
}

// Makes the device of a tensor the current one, where it is not: to ask costs less than to set and set back.
struct OnDevice {
#ifdef ERSDE_WITH_CUDA
  std::optional<c10::cuda::CUDAGuard> guard;
  explicit OnDevice(const at::Device& device) {
    if (device.is_cuda() && c10::cuda::current_device() != device.index()) guard.emplace(device);
  }
#else
  explicit OnDevice(const at::Device&) {}
#endif
};

// Memory for a result: at::empty_like, past the dispatcher where x is contiguous, which saves a microsecond. The device of x is
// the current one.
at::Tensor memory_like(const at::Tensor& x) {
  if (!x.is_contiguous()) return at::empty_like(x);
#ifdef ERSDE_WITH_CUDA
  if (x.is_cuda()) {
    constexpr c10::DispatchKeySet cuda(c10::DispatchKey::CUDA);
    return at::Tensor(at::detail::empty_generic(x.sizes(), at::cuda::getCUDADeviceAllocator(), cuda, x.scalar_type(), std::nullopt));
  }
#endif
  return at::Tensor(at::detail::empty_cpu(x.sizes(), x.scalar_type()));
}

// A tensor that a kernel reads or writes, and what the kernel is told of it.
struct Pair {
  const at::Tensor* tensor;
  ersde::Operand* operand;
};
using Pairs = c10::SmallVector<Pair, ersde::kMaxOperands>;  // more where gradients are wanted

// set_shape of er_sde_prepare.h for tensors; out is the last.
void set_shape(StepArgs& a, const Pairs& pairs, at::IntArrayRef global_shape, at::IntArrayRef global_start, bool sums = false) {
  c10::SmallVector<ersde::View, ersde::kMaxOperands> views;
  for (const auto& p : pairs) views.push_back({p.tensor->strides().data(), p.operand});
  const at::IntArrayRef sizes = pairs.back().tensor->sizes();
  const ersde::Whole whole{global_shape.empty() ? nullptr : global_shape.data(), global_start.empty() ? nullptr : global_start.data()};
  ersde::set_shape(a, views.data(), (int)views.size(), sizes.data(), (int)sizes.size(), whole, sums);
}

#ifdef ERSDE_WITH_CUDA
// Where a kernel is launched on a device, which is the current one.
ersde::Launch launch_on(const at::Device& device) {
  const cudaDeviceProp* card = at::cuda::getDeviceProperties(device.index());
  return {c10::cuda::getCurrentCUDAStream(device.index()).stream(), card->multiProcessorCount, card->major >= 9};
}
void check_launch(const char* error) {
  TORCH_CHECK(error == nullptr, "ersde_fast: the CUDA kernel could not be launched: ", error);
}
#endif

// Shares out [0, n), of which a thread takes at least `grain`, to threads; the pairs are what it reads and writes.
template <typename F>
void in_threads(int64_t n, int64_t grain, const Pairs& pairs, const F& f) {
  if (n <= grain || at::get_num_threads() == 1) return f(0, n);
  std::vector<at::Tensor> kept;  // while other threads of Python may let go of them
  for (const auto& p : pairs) kept.push_back(*p.tensor);
  py::gil_scoped_release release;
  at::parallel_for(0, n, grain, f);
}

// The device is the current one; the pairs are what the arguments point into.
void run(const StepArgs& args, const Pairs& pairs, const at::Device& device) {
#ifdef ERSDE_WITH_CUDA
  if (device.is_cuda()) return check_launch(ersde::step_cuda(args, launch_on(device)));
#endif
  in_threads(args.numel, kGrain, pairs, [&](int64_t begin, int64_t end) { ersde::step_cpu(args, begin, end); });
}

// The same with the log-density, or that alone.
void run(const ersde::LogProbArgs& args, const Pairs& pairs, const at::Device& device) {
#ifdef ERSDE_WITH_CUDA
  if (device.is_cuda()) return check_launch(ersde::log_prob_cuda(args, launch_on(device)));
#endif
  const int64_t batch = args.step.sizes[0], segments = batch * ersde::segments_of(args.step.numel / batch);
  in_threads(segments, kGrain / ersde::kSegment, pairs, [&](int64_t begin, int64_t end) { ersde::log_prob_cpu(args, begin, end); });
  if (args.what != ersde::Density::gradients) ersde::log_prob_sums_cpu(args);
}

}  // namespace
