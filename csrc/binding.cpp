// Python's way into the kernels: one call that checks, allocates, draws and steps, or returns None.
//
// None means "not a plain case", never "failed": the caller then checks the arguments in Python, in words, and either
// raises, takes the reference path, or calls again with trusted = true. So the checks with messages stand in one place.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>

#ifdef ERSDE_WITH_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>

#include "er_sde_plan.h"
#include "step_call.h"
#include "torch_tensors.h"

using namespace py::literals;

namespace {

// ---- torch's stream on CUDA devices ----

enum class TorchStream : int { unchecked, as_here, otherwise };
std::array<TorchStream, 64> torch_stream_of_device{};  // written by Python once for each device, under the GIL

#ifdef ERSDE_WITH_CUDA
// Torch draws tensors that 32-bit byte offsets do not reach in pieces: those are left to torch.
bool torch_draws_in_one_piece(const at::Tensor& x) {
  return 1 + (x.numel() - 1) * (int64_t)x.element_size() <= std::numeric_limits<int32_t>::max();
}

// Takes the numbers that torch.randn would draw for x from the generator, as torch's own kernels do.
void take_torch_stream(StepArgs& a, const at::Tensor& x, const std::optional<at::Generator>& generator, int64_t multiprocessors,
                       int64_t threads_each) {
  if (multiprocessors == 0) {
    const auto* properties = at::cuda::getDeviceProperties(x.get_device());
    multiprocessors = properties->multiProcessorCount;
    threads_each = properties->maxThreadsPerMultiProcessor;
  }
  a.drawn.torch_threads = torch_threads(x.numel(), multiprocessors, threads_each);
  auto& drawn = a.drawn;
  const uint64_t advance = torch_advance(x.numel(), drawn.torch_threads, a.out.dtype);
  auto* g = at::get_generator_or_default<at::CUDAGeneratorImpl>(generator, at::cuda::detail::getDefaultCUDAGenerator(x.get_device()));
  const std::lock_guard<std::mutex> lock(g->mutex_);
  cudaStreamCaptureStatus capturing;
  C10_CUDA_CHECK(cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(x.get_device()).stream(), &capturing));
  if (capturing == cudaStreamCaptureStatusNone) {  // as philox_cuda_state does, which asks again
    drawn.seed = g->current_seed();
    drawn.torch_offset = g->philox_offset_per_thread();
    g->set_philox_offset_per_thread(drawn.torch_offset + advance);
  } else {
    const at::PhiloxCudaState state = g->philox_cuda_state(advance);
    drawn.torch_seed_pointer = reinterpret_cast<const int64_t*>(state.seed_.ptr);
    drawn.torch_offset_pointer = reinterpret_cast<const int64_t*>(state.offset_.ptr);
    drawn.torch_offset = state.offset_intragraph_;
  }
  drawn.source = ersde::Noise::torch;
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
    a.drawn.seed = PyLong_AsUnsignedLongLongMask(seed.ptr());
    return true;
  }
  const at::Tensor* given = tensor_of(seed);
  if (!given || !is_plain(*given)) return false;
  table = given->to(device, /*non_blocking=*/true).contiguous();
  a.drawn.seeds = table.const_data_ptr<int64_t>();
  return true;
}

// A contiguous int64 tensor of that shape on that device; nullptr where it is something else.
const at::Tensor* index_of(py::handle h, at::IntArrayRef shape, const at::Device& device) {
  const at::Tensor* t = tensor_of(h);
  if (!t || !is_plain(*t) || t->scalar_type() != at::kLong || t->sizes() != shape) return nullptr;
  return t->device() == device && t->is_contiguous() ? t : nullptr;
}

// Which row of the table each sample steps by. i: a number; or an int64 tensor, 0-dim; or a pair (plan, step) of int64 [batch].
// What lies on the host is read now, so that a kernel is told the weights themselves; what lies on the device of x is read by
// the kernel, so that a captured graph reads it anew, and always with a ring, whose slots it picks. step: the row, or -1 where
// only the kernel knows it.
bool set_rows(ersde::Rows& rows, const at::Tensor& table, py::handle i, const at::Tensor& x, bool has_ring, int64_t& step) {
  const int64_t num_steps = table.size(-2), columns = table.size(-1), batch = x.dim() ? x.size(0) : 1;
  const double* data = table.const_data_ptr<double>();
  if (columns < ersde::kWD || columns > ersde::kMaxColumns) return false;
  rows.num_columns = (int)columns;
  rows.num_steps = num_steps;
  rows.num_plans = table.dim() == 3 ? table.size(0) : 1;
  step = -1;
  if (PyTuple_Check(i.ptr())) {
    if (PyTuple_GET_SIZE(i.ptr()) != 2 || table.dim() != 3 || table.device() != x.device()) return false;
    const at::Tensor* plan_index = index_of(PyTuple_GET_ITEM(i.ptr(), 0), {batch}, x.device());
    const at::Tensor* step_index = index_of(PyTuple_GET_ITEM(i.ptr(), 1), {batch}, x.device());
    if (!plan_index || !step_index) return false;
    rows.table = data;
    rows.plan_index = plan_index->const_data_ptr<int64_t>();
    rows.step_index = step_index->const_data_ptr<int64_t>();
    rows.index_stride = 1;
    for (int64_t b = 0; x.is_cpu() && b < batch; ++b) {
      const double* row = ersde::row_of(rows, b);
      if (!row || std::isnan(row[ersde::kWX])) return false;
    }
    return true;
  }
  if (table.dim() != 2) return false;
  if (PyLong_Check(i.ptr()) && !PyBool_Check(i.ptr())) {
    step = PyLong_AsLongLong(i.ptr());
    if (PyErr_Occurred()) PyErr_Clear();
  } else if (const at::Tensor* index = has_ring ? nullptr : index_of(i, {}, at::kCPU)) {
    step = *index->const_data_ptr<int64_t>();
  } else {
    index = index_of(i, {}, x.device());
    if (!index || table.device() != x.device()) return false;
    rows.table = data;
    rows.step_index = index->const_data_ptr<int64_t>();
    return true;
  }
  if (step < 0 || step >= num_steps) return false;
  data += step * columns;
  if (table.is_cpu()) std::copy(data, data + columns, rows.row);
  else if (table.device() == x.device()) rows.table = data;
  else return false;
  return true;
}

// A list of numbers, empty for None.
std::vector<int64_t> numbers(py::handle h) { return h.is_none() ? std::vector<int64_t>() : h.cast<std::vector<int64_t>>(); }

py::object step(const StepCall& call) {
  StepArgs a{};
  std::optional<ersde::LogProbArgs> density;  // made where it is asked for: it takes as long to clear as StepArgs
  const at::Tensor *table_found = tensor_of(call.table), *x_found = tensor_of(call.x), *ring = tensor_of(call.ring);
  if (!table_found || !x_found) return py::none();
  const at::Tensor &table = *table_found, &x = *x_found;
  at::Tensor z, out, denoised, seeds, slot;
  const bool grad_mode = c10::GradMode::is_enabled(), predicts = call.predicts.ptr() == Py_True, trusted = call.trusted.ptr() == Py_True;
  const bool sums = !call.reduction.is_none(), given_next = !call.x_next.is_none(), differentiates = !call.gradient.is_none();
  bool draws = call.draws.ptr() == Py_True;
  const auto fits = [&](const at::Tensor& t) { return is_plain(t) && (trusted || !is_differentiated(t, grad_mode)); };
  if (!dtype_of(x, a.out.dtype) || !is_here(x.device()) || !fits(x)) return py::none();
  if (x.dim() >= ersde::kMaxDims || (!trusted && is_traced())) return py::none();
  const auto is_operand = [&](const at::Tensor& t, DType& dtype) {
    return dtype_of(t, dtype) && t.sizes() == x.sizes() && t.device() == x.device() && fits(t);
  };
  const auto operand_of = [&](py::handle h, DType& dtype) {
    const at::Tensor* t = tensor_of(h);
    return t && is_operand(*t, dtype) ? t : nullptr;
  };
  int64_t known_step;
  if (!set_rows(a.rows, table, call.i, x, ring, known_step)) return py::none();
  const double* row = a.rows.table ? nullptr : a.rows.row;
  const int64_t order = table.size(-1) - ersde::kWD;
  if (row) draws = row[ersde::kWNoise] != 0;
  if (sums && ((row && !draws) || ring || x.numel() == 0 || (!given_next && !call.out.is_none()))) return py::none();
  draws &= !given_next;

  // How many predictions are read: what the row says; else all that there can be.
  if (!PyList_Check(call.history.ptr()) && !PyTuple_Check(call.history.ptr())) return py::none();
  const int64_t given = PySequence_Fast_GET_SIZE(call.history.ptr());
  int64_t uses = known_step < 0 ? order : std::min(order, known_step + 1);
  while (row && uses > 0 && row[ersde::kWD + uses - 1] == 0) --uses;
  if (predicts) uses = std::max<int64_t>(uses, 1);
  if (ring && (given != 1 || ring->size(0) != order || known_step >= 0)) return py::none();
  if (!ring && given < uses) {
    if (row || !trusted || (predicts && given == 0)) return py::none();
    uses = given;
  }
  a.rows.predictions = (int)uses;

  a.float64 = a.out.dtype == DType::float64;
  DType slot_dtype{};
  if (ring && !is_operand(slot = (*ring)[0], slot_dtype)) return py::none();
  Pairs pairs;
  const auto add_operand = [&](ersde::Operand& o, const at::Tensor& t, DType dtype) {
    o.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    o.dtype = dtype;
    a.float64 |= dtype == DType::float64;
    pairs.push_back({&t, &o});
  };
  const auto add_term = [&](const at::Tensor& t, int64_t column, DType dtype) {
    const bool wanted = (predicts && a.num_terms < 2) || differentiates;  // a prediction is of x and the first of the history
    if (row && row[column] == 0 && !wanted) return;
    a.rows.columns[a.num_terms] = (int)column;
    add_operand(a.terms[a.num_terms++], t, dtype);
  };
  std::fill(std::begin(a.rows.columns), std::end(a.rows.columns), -1);
  add_term(x, ersde::kWX, a.out.dtype);
  for (int64_t k = 0; k < uses; ++k) {
    DType dtype = slot_dtype;
    const at::Tensor* t = ring && k > 0 ? &slot : operand_of(PySequence_Fast_GET_ITEM(call.history.ptr(), k), dtype);
    if (!t) return py::none();
    add_term(*t, ersde::kWD + k, dtype);
  }
  if (predicts) {
    a.rows.predicts = true;
    if (row && !std::isfinite(row[ersde::kPX])) return py::none();
    if (!call.unconditional.is_none()) {
      DType dtype;
      const at::Tensor *guide = operand_of(call.unconditional, dtype), *scales = tensor_of(call.scale);
      if (!guide) return py::none();
      a.rows.guided = true;
      add_operand(a.guide, *guide, dtype);
      if (call.cfg_pp.ptr() == Py_True) add_term(*guide, ersde::kWGuide, dtype);
      if (scales) {
        if (scales->scalar_type() != at::kDouble || scales->dim() != 1 || scales->size(0) != (x.dim() ? x.size(0) : 1)) return py::none();
        if (scales->device() != x.device() || !scales->is_contiguous() || !fits(*scales)) return py::none();
        a.rows.scales = scales->const_data_ptr<double>();
      } else {
        PyObject* scale = call.scale.ptr();
        a.rows.scale = PyFloat_AsDouble(scale);
        const bool fits_double = !PyErr_Occurred();
        if (!fits_double) PyErr_Clear();
        const bool number = PyFloat_Check(scale) || (PyLong_Check(scale) && !PyBool_Check(scale));
        if (!number || !fits_double || !std::isfinite(a.rows.scale)) return py::none();
      }
    }
  } else if (!call.unconditional.is_none()) {
    return py::none();
  }

  if (!call.noise.is_none() + !call.generator.is_none() + !call.seed.is_none() > 1) return py::none();
  if (!call.noise.is_none()) {
    DType dtype;
    const at::Tensor* given_noise = operand_of(call.noise, dtype);
    if (!given_noise) return py::none();
    add_term(*given_noise, ersde::kWNoise, dtype);
  }
  std::optional<at::Generator> torch_generator;
  if (!call.generator.is_none()) {
    if (!THPGenerator_Check(call.generator.ptr())) return py::none();
    torch_generator = py::cast<at::Generator>(call.generator);
    const at::Device on = torch_generator->device();  // its index may be left open
    if (on.type() != x.device().type() || (on.has_index() && x.device().has_index() && on != x.device())) return py::none();
  }
  const OnDevice here(x.device());
  if (!call.seed.is_none() && !set_seeds(a, call.seed, x.device(), seeds)) return py::none();
  if (draws && a.rows.index_stride && call.noise.is_none() && call.seed.is_none()) return py::none();

  if (given_next) {
    const at::Tensor* next = operand_of(call.x_next, a.out.dtype);
    if (!next) return py::none();
    out = *next;
  } else if (call.out.is_none()) {
    out = memory_like(x);
  } else {
    DType out_dtype;
    const at::Tensor* given_out = operand_of(call.out, out_dtype);
    if (!given_out || out_dtype != a.out.dtype) return py::none();
    out = *given_out;
    if (!trusted) {
      if (at::has_internal_overlap(out) != at::MemOverlap::No) return py::none();
      for (const auto& p : pairs) {
        const auto status = at::get_overlap_status(out, *p.tensor);
        if (status != at::MemOverlapStatus::No && status != at::MemOverlapStatus::Full) return py::none();
        if (status == at::MemOverlapStatus::Full && (out.strides() != p.tensor->strides() || out.scalar_type() != p.tensor->scalar_type())) {
          return py::none();
        }
      }
    }
  }
  RECORD_FUNCTION("ersde_fast::step", c10::ArrayRef<const c10::IValue>());
  if (ring) {
    a.rows.ring = (int)ring->size(0);
    a.rows.ring_stride = ring->stride(0) * ring->element_size();
    add_operand(a.denoised, slot, slot_dtype);
  } else if (predicts && !given_next) {
    denoised = memory_like(x);
    add_operand(a.denoised, denoised, a.out.dtype);
  }
  at::Tensor log_prob;
  const auto result = [&] {
    if (given_next) return differentiates ? py::object(py::bool_(true)) : py::cast(log_prob);
    const py::object next = call.out.is_none() ? py::cast(out) : py::reinterpret_borrow<py::object>(call.out);
    if (sums) return predicts ? py::object(py::make_tuple(next, denoised, log_prob)) : py::object(py::make_tuple(next, log_prob));
    return predicts && !ring ? py::object(py::make_tuple(next, denoised)) : next;
  };
  a.numel = out.numel();
  if (a.numel == 0) return result();

  if (draws && call.noise.is_none()) {
    if (!call.seed.is_none()) {
      a.drawn.source = ersde::Noise::portable;
    } else {
#ifdef ERSDE_WITH_CUDA
      const std::vector<int64_t> torch_layout = numbers(call.torch_layout);
      if (x.is_cuda() && (!torch_layout.empty() || torch_draws_in_one_piece(x))) {
        const auto stream = torch_stream_of_device[x.get_device()];
        if (stream == TorchStream::unchecked) return py::none();
        if (stream == TorchStream::as_here) {
          take_torch_stream(a, x, torch_generator, torch_layout.empty() ? 0 : torch_layout[0], torch_layout.empty() ? 0 : torch_layout[1]);
        }
      }
#endif
      if (a.drawn.source == ersde::Noise::none) {
        z = at::randn(x.sizes(), torch_generator, x.options().requires_grad(false));
        add_term(z, ersde::kWNoise, a.out.dtype);
      }
    }
  }
  a.batched = sums || a.drawn.source == ersde::Noise::portable || a.rows.index_stride || a.rows.scales;
  if (sums && a.rows.index_stride && x.is_cpu()) {
    for (int64_t b = 0; b < (x.dim() ? x.size(0) : 1); ++b) {
      if (ersde::row_of(a.rows, b)[ersde::kWNoise] == 0) return py::none();
    }
  }
  at::Tensor memory;  // for what segments sum to
  if (sums) {
    const int64_t batch = x.dim() ? x.size(0) : 1;
    const auto float64 = x.options().dtype(at::kDouble).requires_grad(false);
    density.emplace();
    density->what = differentiates ? ersde::Density::gradients : given_next ? ersde::Density::of_sample : ersde::Density::of_step;
    density->mean = PyUnicode_CompareWithASCIIString(call.reduction.ptr(), "mean") == 0;
    if (differentiates) {
      const at::Tensor* gradient = tensor_of(call.gradient);
      if (!gradient || gradient->scalar_type() != at::kDouble || gradient->numel() != batch || !gradient->is_contiguous()) return py::none();
      density->log_prob = const_cast<double*>(gradient->const_data_ptr<double>());
      const int64_t guided = a.rows.guided, last = PyList_GET_SIZE(call.gradients.ptr()) - 1;
      for (int64_t k = 0; k <= last; ++k) {
        DType dtype;
        const at::Tensor* t = operand_of(PyList_GET_ITEM(call.gradients.ptr(), k), dtype);
        if (t) add_operand(density->gradients[k == last ? ersde::kMaxTerms + 1 : k + guided == last ? ersde::kMaxTerms : k], *t, dtype);
      }
    } else {
      log_prob = at::empty(x.sizes().slice(0, x.dim() ? 1 : 0), float64);
      memory = at::empty({batch * ersde::segments_of(x.numel() / batch)}, float64);
      density->log_prob = log_prob.mutable_data_ptr<double>();
      density->sums = memory.mutable_data_ptr<double>();
    }
  }
  a.out.data = given_next ? static_cast<char*>(const_cast<void*>(out.const_data_ptr())) : static_cast<char*>(out.mutable_data_ptr());
  pairs.push_back({&out, &a.out});
  set_shape(a, pairs, numbers(call.global_shape), numbers(call.global_start), sums);
  if (sums) {
    density->step = a;
    run(*density, pairs, x.device());
  } else {
    run(a, pairs, x.device());
  }
  return result();
}

// step, as Python calls it: without pybind11's conversions, which take longer than the rest of a small step's checks.
PyObject* step_of_python(PyObject*, PyObject* const* given, Py_ssize_t by_position, PyObject* keywords) {
  HANDLE_TH_ERRORS
  return step(call_of(given, by_position, keywords)).release().ptr();
  END_HANDLE_TH_ERRORS
}
PyMethodDef kStepMethods[] = {{"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step_of_python)),
                               METH_FASTCALL | METH_KEYWORDS, nullptr},
                              {nullptr, nullptr, 0, nullptr}};

// out = the noise alone: a step of one term whose weight is 0, so that the kernels for one term serve.
StepArgs noise_alone(const at::Tensor& out) {
  StepArgs a{};
  TORCH_CHECK(dtype_of(out, a.out.dtype) && out.is_contiguous(), "out must be a contiguous tensor of a supported dtype");
  a.out.data = static_cast<char*>(out.mutable_data_ptr());
  a.numel = out.numel();
  a.float64 = a.out.dtype == DType::float64;
  a.num_terms = 1;
  a.terms[0].data = a.out.data;
  a.terms[0].dtype = a.out.dtype;
  std::fill(std::begin(a.rows.columns) + 1, std::end(a.rows.columns), -1);
  a.rows.columns[0] = ersde::kWX;
  a.rows.num_columns = ersde::kWD;  // the table of order 0
  a.rows.row[ersde::kWNoise] = 1;
  return a;
}

void run_alone(StepArgs& a, const at::Tensor& out) {
  const Pairs pairs{{&out, &a.terms[0]}, {&out, &a.out}};
  const OnDevice here(out.device());
  set_shape(a, pairs, {}, {});
  run(a, pairs, out.device());
}

// Fills a contiguous tensor [batch, ...] with the portable stream.
void portable_noise(const at::Tensor& out, py::handle seed, int64_t step) {
  StepArgs a = noise_alone(out);
  at::Tensor seeds;
  if (a.numel == 0) return;
  TORCH_CHECK(set_seeds(a, seed, out.device(), seeds), "seed must be a number or an int64 tensor");
  a.drawn.source = ersde::Noise::portable;
  a.batched = true;
  a.rows.row[ersde::kCounter] = (uint32_t)step;
  run_alone(a, out);
}

// Fills a contiguous tensor with what torch.randn draws on a CUDA card of that layout under this seed and offset; returns by
// how much the offset grows.
int64_t torch_noise(const at::Tensor& out, py::handle seed, int64_t offset, int64_t multiprocessors, int64_t threads_each) {
  StepArgs a = noise_alone(out);
  if (a.numel == 0) return 0;
  a.drawn.torch_threads = torch_threads(a.numel, multiprocessors, threads_each);
  a.drawn.seed = PyLong_AsUnsignedLongLongMask(seed.ptr());
  a.drawn.torch_offset = (uint64_t)offset;
  const int64_t grows = (int64_t)torch_advance(a.numel, a.drawn.torch_threads, a.out.dtype);
  if (out.is_cpu()) {
    float* data = out.mutable_data_ptr<float>();
    py::gil_scoped_release release;
    at::parallel_for(0, a.numel, kGrain, [&](int64_t begin, int64_t end) {
      ersde::torch_noise_cpu(data + begin, a.drawn.seed, a.drawn.torch_offset, a.drawn.torch_threads, begin, end - begin);
    });
    return grows;
  }
  a.drawn.source = ersde::Noise::torch;
  run_alone(a, out);
  return grows;
}

// An enumerator from its name in Python.
template <typename Enum, size_t n>
Enum named(const char* argument, const std::string& name, const std::pair<const char*, Enum> (&known)[n]) {
  std::string names;
  for (const auto& [its_name, value] : known) {
    if (name == its_name) return value;
    names += (names.empty() ? "" : ", ") + std::string(its_name);
  }
  TORCH_CHECK_VALUE(false, argument, " must be one of ", names, ", got ", name);
}
template <typename Enum, size_t n>
std::vector<std::string> names_of(const std::pair<const char*, Enum> (&known)[n]) {
  std::vector<std::string> names;
  for (const auto& [name, value] : known) names.push_back(name);
  return names;
}
// The table of a plan [num_steps, kWD + order] and its levels [3, num_steps + 1], sigmas, alphas, er_lambdas, on the device of
// sigmas, without waiting for it. options: PlanOptions of weights.py, whose eta is a number or float64 [num_steps] there; orders:
// theirs as int32 [num_steps] there, or None where they are alike.
py::tuple plan(const at::Tensor& sigmas, const std::optional<at::Tensor>& alphas, py::handle options,
               const std::optional<at::Tensor>& orders) {
  const auto option = [&](const char* name) { return options.attr(name); };
  const auto text = [&](const char* name) { return option(name).cast<std::string>(); };
  const auto number = [&](const char* name, double absent) {
    const py::object value = option(name);
    return value.is_none() ? absent : value.cast<double>();
  };
  ersde::PlanArgs a{};
  const at::Tensor s = sigmas.contiguous(), given = alphas ? alphas->contiguous() : at::Tensor();
  TORCH_CHECK(dtype_of(s, a.sigmas_dtype) && (!alphas || dtype_of(given, a.alphas_dtype)), "sigmas must be float64 or float32");
  a.num_steps = s.size(0) - 1;
  a.sigmas = s.const_data_ptr();
  a.alphas = alphas ? given.const_data_ptr() : nullptr;
  a.process = alphas ? ersde::Process::given : named("process", text("process"), ersde::kProcesses);
  for (const py::handle order : option("orders")) a.order = std::max(a.order, order.cast<int>());
  TORCH_CHECK_VALUE(a.order >= 1 && a.order <= ersde::kMaxPredictions, "order must be 1 to ", ersde::kMaxPredictions, ", got ", a.order);
  a.orders = orders ? orders->const_data_ptr<int32_t>() : nullptr;
  const py::object scaler = option("noise_scaler");
  a.scaler = named("noise_scaler.form", scaler.attr("form").cast<std::string>(), ersde::kScalers);
  const at::Tensor* etas = tensor_of(option("eta"));
  a.etas = etas ? etas->const_data_ptr<double>() : nullptr;
  a.strength = scaler.attr("strength").cast<double>() * (etas ? 1 : number("eta", 1));
  a.method = named("method", text("method"), ersde::kMethods);
  a.node_scale = number("node_scale", NAN);
  a.integration_points = (int)number("integration_points", 0);
  a.s_noise = number("s_noise", 1);
  a.guidance = number("guidance", -1);
  a.first_step = (uint32_t)option("first_step").cast<int64_t>();
  const auto float64 = s.options().dtype(at::kDouble).requires_grad(false);
  const at::Tensor table = at::empty({a.num_steps, ersde::kWD + a.order}, float64);
  const at::Tensor schedule = at::empty({3, a.num_steps + 1}, float64);
  a.table = table.mutable_data_ptr<double>();
  a.schedule = schedule.mutable_data_ptr<double>();
#ifdef ERSDE_WITH_CUDA
  if (s.is_cuda()) {
    const OnDevice here(s.device());
    const char* error = ersde::plan_cuda(a, at::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(error == nullptr, "ersde_fast: the CUDA kernel could not be launched: ", error);
    return py::make_tuple(table, schedule);
  }
#endif
  ersde::plan_cpu(a);
  return py::make_tuple(table, schedule);
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
  intern_keywords();
  if (PyModule_AddFunctions(m.ptr(), kStepMethods) != 0) throw py::error_already_set();
  // Wrapped, so that torch's errors become Python's here, as those of `step` do, and not in pybind11's part of another library.
  m.def("plan", torch::wrap_pybind_function(plan));
  // What Python states too; a test holds both to each other.
  py::dict facts;
  facts["max_dims"] = ersde::kMaxDims;
  facts["max_order"] = ersde::kMaxPredictions;
  facts["columns"] = py::dict("COUNTER"_a = (int)ersde::kCounter, "P_X"_a = (int)ersde::kPX, "P_M"_a = (int)ersde::kPM,
                              "W_GUIDE"_a = (int)ersde::kWGuide, "W_NOISE"_a = (int)ersde::kWNoise, "W_X"_a = (int)ersde::kWX, "W_D"_a = (int)ersde::kWD);
  facts["processes"] = names_of(ersde::kProcesses);
  facts["forms"] = names_of(ersde::kScalers);
  facts["methods"] = names_of(ersde::kMethods);
  m.attr("facts") = facts;
  m.def("portable_noise", torch::wrap_pybind_function(portable_noise));
  m.def("torch_noise", torch::wrap_pybind_function(torch_noise));
  m.def("torch_stream", [](int device) { return (int)torch_stream_of_device.at(device); });
  m.def("set_torch_stream", [](int device, bool as_here) {
    torch_stream_of_device.at(device) = as_here ? TorchStream::as_here : TorchStream::otherwise;
  });
  m.def("box_muller", torch::wrap_pybind_function(box_muller));
  m.def("instruction_set", &ersde::instruction_set_name);
  m.def("use_instruction_set", [](int set) { return ersde::use_instruction_set(static_cast<ersde::InstructionSet>(set)); });
}
