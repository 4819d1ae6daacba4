// The kernels behind a C interface. No torch header, and nothing of CUDA's: its driver is called by address.
#include "er_sde_c.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "er_sde_plan.h"
#include "er_sde_prepare.h"

namespace {

using namespace ersde;

static_assert((int)ersde_w_guide == kWGuide && (int)ersde_w_noise == kWNoise && (int)ersde_w_d == kWD);
static_assert(sizeof(ersde_call) % sizeof(int64_t) == 0);
static_assert((int)ersde_of_guide == kMaxTerms && (int)ersde_of_next == kMaxTerms + 1);

// The arguments of a kernel from the words of a call, which the views point into.
struct Step {
  LogProbArgs density{};
  StepArgs& args = density.step;
  View views[kMaxViews];
  int count = 0;
  int64_t batch = 1;
  bool sums = false;  // whether the log-density is asked for
};

constexpr int64_t kOfSample = 1 + (int)Density::of_sample, kGradients = 1 + (int)Density::gradients;  // of ersde_call.density

bool has_density(const int64_t* words) {
  ersde_call call;
  std::memcpy(&call, words, sizeof call);
  return call.density != 0;
}
bool writes_prediction(const ersde_call& call) { return call.predicts && call.density < kOfSample; }

void add_operand(Step& s, Operand& o, const int64_t* tensor) {
  o.data = reinterpret_cast<char*>(tensor[0]);
  o.dtype = static_cast<DType>(tensor[1]);
  s.args.float64 |= o.dtype == DType::float64;
  s.views[s.count++] = {tensor + 2, &o};
}

// Where each sample finds its row; whether there is one.
bool set_rows(Rows& rows, const ersde_call& call, int64_t batch) {
  const auto numbers = [](int64_t address) { return reinterpret_cast<const int64_t*>(address); };
  if (call.columns < kWD || call.columns > kMaxColumns) return false;
  rows.num_columns = (int)call.columns;
  rows.num_plans = call.num_plans;
  rows.num_steps = call.num_steps;
  rows.table = reinterpret_cast<const double*>(call.table);
  rows.plan_index = numbers(call.plan_index);
  rows.step_index = numbers(call.step_index);
  rows.index_stride = call.index_stride;
  rows.scales = reinterpret_cast<const double*>(call.scales);
  rows.ring = (int)call.ring;
  rows.ring_stride = call.ring_stride;
  rows.predicts = call.predicts != 0;
  rows.guided = call.guided != 0;
  if (call.row) std::copy_n(reinterpret_cast<const double*>(call.row), call.columns, rows.row);
  return call.row || call.table || batch == 0;
}

// Whether the call can be. binding.cpp has the same rules for what a step reads.
bool read(Step& s, const int64_t* words, double scale) {
  ersde_call call;
  std::memcpy(&call, words, sizeof call);
  StepArgs& a = s.args;
  const int dims = (int)call.dims;
  if (dims < 0 || dims >= kMaxDims) return false;
  const int64_t* sizes = words + sizeof call / sizeof(int64_t);
  const int64_t* whole = sizes + dims;
  const int64_t* tensor = whole + (call.sharded ? 2 * (dims - 1) : 0);
  const auto next_tensor = [&] { return std::exchange(tensor, tensor + 2 + dims); };
  if (dims) s.batch = sizes[0];
  if (!set_rows(a.rows, call, s.batch)) return false;
  a.rows.scale = scale;
  const double* row = call.row ? a.rows.row : nullptr;
  if (row && call.predicts && !std::isfinite(row[kPX])) return false;

  const int64_t order = call.columns - kWD;
  int64_t uses = call.step < 0 ? order : std::min(order, call.step + 1);
  while (row && uses > 0 && row[kWD + uses - 1] == 0) --uses;
  if (call.predicts) uses = std::max<int64_t>(uses, 1);
  if (!call.ring && call.predictions < uses) {
    if (row || (call.predicts && call.predictions == 0)) return false;
    uses = call.predictions;
  }
  a.rows.predictions = (int)uses;

  std::fill(std::begin(a.rows.columns), std::end(a.rows.columns), -1);
  const auto add_term = [&](int64_t column, const int64_t* t) {
    const bool wanted = (call.predicts && a.num_terms < 2) || call.alone || call.density == kGradients;
    if (row && row[column] == 0 && !wanted) return;
    a.rows.columns[a.num_terms] = (int)column;
    add_operand(s, a.terms[a.num_terms++], t);
  };
  const int64_t* x = next_tensor();
  a.out.dtype = static_cast<DType>(x[1]);
  a.float64 = a.out.dtype == DType::float64;
  add_term(kWX, x);
  const int64_t* history = tensor;
  tensor += call.predictions * (2 + dims);
  const int64_t* guide = call.guided ? next_tensor() : nullptr;
  const int64_t* noise = call.has_noise ? next_tensor() : nullptr;
  const int64_t* denoised = writes_prediction(call) ? next_tensor() : nullptr;
  const int64_t* out = next_tensor();
  if (call.density && (call.ring || (row && row[kWNoise] == 0))) return false;
  for (int64_t k = 0; k < uses; ++k) add_term(kWD + k, call.ring && k > 0 ? denoised : history + k * (2 + dims));
  if (guide) add_operand(s, a.guide, guide);
  if (guide && call.cfg_pp) add_term(kWGuide, guide);
  if (noise) add_term(kWNoise, noise);
  if (denoised) add_operand(s, a.denoised, denoised);
  for (int k = 0; k < kMaxTerms + 2; ++k) {
    if (call.wanted >> k & 1) add_operand(s, s.density.gradients[k], next_tensor());
  }
  a.out.dtype = static_cast<DType>(out[1]);
  add_operand(s, a.out, out);

  a.numel = 1;
  for (int d = 0; d < dims; ++d) a.numel *= sizes[d];
  if (call.density < kOfSample && (!row || row[kWNoise] != 0)) a.drawn.source = static_cast<Noise>(call.source);
  a.drawn.seeds = reinterpret_cast<const int64_t*>(call.seeds);
  a.drawn.seed = (uint64_t)call.seed;
  a.drawn.torch_threads = call.torch_threads;
  a.drawn.torch_offset = (uint64_t)call.torch_offset;
  s.sums = call.density != 0;
  a.batched = s.sums || a.drawn.source == Noise::portable || a.rows.index_stride || a.rows.scales;
  if (a.numel == 0) return !s.sums;
  set_shape(a, s.views, s.count, sizes, dims, call.sharded ? Whole{whole, whole + dims - 1} : Whole{}, s.sums);
  if (s.sums) {
    s.density.what = static_cast<Density>(call.density - 1);
    s.density.mean = call.mean != 0;
    s.density.log_prob = reinterpret_cast<double*>(call.log_prob);
    s.density.sums = reinterpret_cast<double*>(call.sums);
  }
  return true;
}

// ---- tensors of Python: the structures of DLPack 1 ----

constexpr int32_t kOnCPU = 1, kOnCUDA = 2, kPinned = 3;

struct Tensor {
  void* data;
  int32_t device_type, device_index, dims;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};
struct ExchangeAPI {
  uint32_t major, minor;
  const void* older;
  const void* others[3];  // that own what they give
  int (*tensor_of_object)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};

// -1 where a step has none of that type.
int dtype_of(const Tensor& t) {
  constexpr uint8_t kFloat = 2, kBFloat = 4;
  if (t.lanes != 1) return -1;
  if (t.type_code == kBFloat) return t.bits == 16 ? (int)DType::bfloat16 : -1;
  if (t.type_code != kFloat) return -1;
  return t.bits == 32 ? (int)DType::float32 : t.bits == 64 ? (int)DType::float64 : t.bits == 16 ? (int)DType::float16 : -1;
}

// The call with the words of each tensor; false where they differ in shape or device, or have too many dimensions.
bool words_of(const int64_t* objects, const ExchangeAPI* api, int64_t* words) {
  ersde_call call;
  std::memcpy(&call, objects, sizeof call);
  objects += sizeof call / sizeof(int64_t);
  int64_t count = 2 + call.predictions + call.guided + call.has_noise + writes_prediction(call);
  for (int k = 0; k < kMaxTerms + 2; ++k) count += call.wanted >> k & 1;
  const auto device_of = [](const Tensor& t) { return t.device_type == kPinned ? kOnCPU : t.device_type; };
  int64_t* next = words + sizeof call / sizeof(int64_t);
  Tensor x;
  for (int64_t k = 0; k < count; ++k) {
    Tensor t;
    if (api->tensor_of_object(reinterpret_cast<void*>(objects[k]), &t)) return false;
    if (k == 0) {
      x = t;
      if (x.dims >= kMaxDims || count > kMaxViews) return false;
      call.dims = x.dims;
      std::memcpy(words, &call, sizeof call);
      next = std::copy_n(x.sizes, x.dims, next);
      if (call.sharded) next = std::copy_n(objects + count, 2 * (x.dims - 1), next);
    }
    const int dtype = dtype_of(t);
    if (dtype < 0 || t.dims != x.dims || !std::equal(t.sizes, t.sizes + t.dims, x.sizes)) return false;
    if (device_of(t) != device_of(x) || t.device_index != x.device_index) return false;
    if (!t.data && std::find(t.sizes, t.sizes + t.dims, 0) == t.sizes + t.dims) return false;  // zeros without memory
    *next++ = reinterpret_cast<int64_t>(t.data) + (int64_t)t.byte_offset;
    *next++ = dtype;
    next = std::copy_n(t.strides, t.dims, next);
  }
  return true;
}

// ---- launches by CUDA's driver, whose types these are ----

struct LaunchAttribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    int allowed;
  };
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};
using LaunchKernelEx = int (*)(const LaunchConfig*, void* function, void** arguments, void** extra);

using CaptureInfo = int (*)(void* stream, int* status, uint64_t* id, void** graph, const void** nodes, const void** edges, size_t* count);

constexpr int kProgrammaticStreamSerialization = 6;
constexpr const char* kVectorTypes[] = {"float", "__nv_bfloat16", "__half"};
constexpr const char* kSources[] = {"none", "portable", "torch"};
constexpr const char* kDensities[] = {"of_step", "of_step", "of_step", "of_sample", "gradients"};  // of_step with each source of noise
constexpr int kElementKernels = 3 * kMaxVectorTerms * 3 * 2, kPlanKernel = kElementKernels + 4;
constexpr int kDensityKernels = kPlanKernel + 1, kDensityElements = kDensityKernels + 3 * 2 * 5, kSumsKernel = kDensityElements + 2;
static_assert(kSumsKernel + 1 == ersde_kernels);

int vector_type(DType t) { return t == DType::float32 ? 0 : t == DType::bfloat16 ? 1 : 2; }

int kernel_of(const StepLaunch& l) {
  if (!l.vectors) return kElementKernels + 2 * l.float64 + l.large;
  return ((vector_type(l.dtype) * kMaxVectorTerms + l.terms - 1) * 3 + (int)l.source) * 2 + l.predicts;
}

int kernel_of(const LogProbLaunch& l) {
  if (!l.vectors) return kDensityElements + l.float64;
  const int which = l.what == Density::of_step ? (int)l.source : 2 + (int)l.what;
  return kDensityKernels + 5 * (2 * vector_type(l.dtype) + (l.terms == kMaxTerms)) + which;
}

// As has_a_kernel_before of er_sde_launch.h.
bool has_a_kernel_before(const ersde_device* device, void* stream) {
  int capturing = 0;
  const void *nodes, *edges;
  size_t count = 0;
  const auto capture_info = reinterpret_cast<CaptureInfo>(device->capture_info);
  return !capture_info(stream, &capturing, nullptr, nullptr, &nodes, &edges, &count) && (!capturing || count > 0);
}

int launch(ersde_device* device, int kernel, const unsigned (&grid)[2], unsigned threads, const void* arguments, void* stream, bool early) {
  if (!device->kernels[kernel]) {
    device->wanted = kernel;
    return ersde_needs_kernel;
  }
  LaunchAttribute attribute{};
  attribute.id = kProgrammaticStreamSerialization;
  attribute.allowed = 1;
  early = early && has_a_kernel_before(device, stream);
  const LaunchConfig config{{grid[0], grid[1], 1}, {threads, 1, 1}, 0, stream, &attribute, early ? 1u : 0u};
  void* parameters[] = {const_cast<void*>(arguments)};
  const int error = reinterpret_cast<LaunchKernelEx>(device->launch)(&config, device->kernels[kernel], parameters, nullptr);
  if (error) device->error = error;
  return error ? ersde_failed : 0;
}

int log_prob_cuda(const LogProbArgs& a, ersde_device* device, void* stream) {
  const LogProbLaunch l = launch_of(a, (int)device->multiprocessors);
  const void* arguments = l.vectors ? static_cast<const void*>(&l.vector) : l.elements;
  for (const int kernel : {kernel_of(l), kSumsKernel}) {  // both are there before either runs
    if (device->kernels[kernel] || (kernel == kSumsKernel && !l.sums)) continue;
    device->wanted = kernel;
    return ersde_needs_kernel;
  }
  const int answer = launch(device, kernel_of(l), l.grid, kThreads, arguments, stream, device->early != 0);
  if (answer || !l.sums) return answer;
  return launch(device, kSumsKernel, {(unsigned)a.step.sizes[0], 1}, kSumLanes, &l.last, stream, device->early != 0);
}

template <typename Enum, size_t n>
bool named(const char* name, const std::pair<const char*, Enum> (&known)[n], Enum& value) {
  for (const auto& [its_name, its_value] : known) {
    if (std::strcmp(name, its_name) != 0) continue;
    value = its_value;
    return true;
  }
  return false;
}

int read(PlanArgs& a, const ersde_plan_call& call) {
  a.num_steps = call.num_steps;
  a.sigmas = call.sigmas;
  a.alphas = call.alphas;
  a.sigmas_dtype = static_cast<DType>(call.sigmas_dtype);
  a.alphas_dtype = static_cast<DType>(call.alphas_dtype);
  a.process = Process::given;
  a.order = (int)call.order;
  a.orders = call.orders;
  a.strength = call.strength;
  a.etas = call.etas;
  a.node_scale = call.node_scale;
  a.integration_points = (int)call.integration_points;
  a.s_noise = call.s_noise;
  a.guidance = call.guidance;
  a.first_step = (uint32_t)call.first_step;
  a.table = call.table;
  a.schedule = call.schedule;
  if (!call.alphas && !named(call.process, kProcesses, a.process)) return ersde_no_process;
  if (!named(call.scaler, kScalers, a.scaler)) return ersde_no_scaler;
  if (!named(call.method, kMethods, a.method)) return ersde_no_method;
  return call.order >= 1 && call.order <= kMaxPredictions ? 0 : ersde_no_order;
}

}  // namespace

int ersde_version(void) { return ERSDE_C_VERSION; }

int ersde_step(const int64_t* call, double scale, int64_t begin, int64_t end) {
  Step s;
  if (!read(s, call, scale)) return ersde_not_plain;
  if (begin == end) return 0;
  for (int64_t b = 0; s.args.rows.index_stride && b < s.batch; ++b) {
    const double* row = row_of(s.args.rows, b);
    if (!row || std::isnan(row[kWX]) || (s.sums && row[kWNoise] == 0)) return ersde_not_plain;
  }
  if (s.sums) log_prob_cpu(s.density, begin, end < 0 ? s.args.sizes[0] * segments_of(s.args.numel / s.args.sizes[0]) : end);
  else if (s.args.numel) step_cpu(s.args, begin, end < 0 ? s.args.numel : end);
  return 0;
}

int ersde_log_prob_sums(const int64_t* call, double scale) {
  Step s;
  if (!read(s, call, scale)) return ersde_not_plain;
  if (s.density.what != Density::gradients) log_prob_sums_cpu(s.density);
  return 0;
}

int64_t ersde_segments(int64_t size) { return segments_of(size); }

int ersde_step_cuda(const int64_t* call, double scale, ersde_device* device, void* stream) {
  Step s;
  if (!read(s, call, scale)) return ersde_not_plain;
  if (s.args.numel == 0) return 0;
  if (s.sums) return log_prob_cuda(s.density, device, stream);
  const StepLaunch l = launch_of(s.args, (int)device->multiprocessors);
  const void* arguments = l.vectors ? static_cast<const void*>(&l.vector) : l.elements;
  return launch(device, kernel_of(l), l.grid, kThreads, arguments, stream, device->early != 0);
}

int ersde_words(const int64_t* objects, const void* api, int64_t* words) {
  return words_of(objects, static_cast<const ExchangeAPI*>(api), words) ? 0 : ersde_not_plain;
}

int ersde_step_objects(const int64_t* objects, double scale, const void* api) {
  int64_t words[ersde_most_words];
  const int answer = ersde_words(objects, api, words);
  if (answer) return answer;
  const int step = ersde_step(words, scale, 0, -1);
  return step || !has_density(words) ? step : ersde_log_prob_sums(words, scale);
}

int ersde_step_objects_cuda(const int64_t* objects, double scale, const void* api, ersde_device* device) {
  int64_t words[ersde_most_words];
  void* stream = nullptr;
  const int answer = ersde_words(objects, api, words);
  if (answer) return answer;
  if (static_cast<const ExchangeAPI*>(api)->current_stream(kOnCUDA, (int32_t)device->index, &stream)) return ersde_not_plain;
  return ersde_step_cuda(words, scale, device, stream);
}

const char* ersde_kernel_name(int kernel) {
  static thread_local char name[128];
  if (kernel == kPlanKernel) return "ersde::plan_rows";
  if (kernel == kSumsKernel) return "ersde::log_prob_sums";
  if (kernel >= kDensityElements) return kernel == kDensityElements ? "ersde::log_prob_elements<float>" : "ersde::log_prob_elements<double>";
  if (kernel >= kDensityKernels) {
    const int which = (kernel - kDensityKernels) % 5, terms = (kernel - kDensityKernels) / 5 % 2 ? kMaxTerms : kFewTerms;
    std::snprintf(name, sizeof name, "ersde::log_prob_vectors<%s, %d, ersde::Density::%s, ersde::Noise::%s>",
                  kVectorTypes[(kernel - kDensityKernels) / 10], terms, kDensities[which], kSources[which < 3 ? which : 0]);
    return name;
  }
  if (kernel >= kElementKernels) {
    const int which = kernel - kElementKernels;
    std::snprintf(name, sizeof name, "ersde::step_elements<%s, %s>", which / 2 ? "double" : "float", which % 2 ? "uint64_t" : "uint32_t");
    return name;
  }
  const int predicts = kernel % 2, source = kernel / 2 % 3, terms = kernel / 6 % kMaxVectorTerms + 1;
  const char* type = kVectorTypes[kernel / 6 / kMaxVectorTerms];
  if ((predicts && terms < 2) || (source != 0 && terms == kMaxVectorTerms)) return "";
  const char* flag = predicts ? "true" : "false";
  if (static_cast<Noise>(source) == Noise::torch) std::snprintf(name, sizeof name, "ersde::step_vectors_torch<%s, %d, %s>", type, terms, flag);
  else std::snprintf(name, sizeof name, "ersde::step_vectors<%s, %d, ersde::Noise::%s, %s>", type, terms, kSources[source], flag);
  return name;
}

int ersde_plan(const ersde_plan_call* call) {
  PlanArgs a{};
  const int answer = read(a, *call);
  if (!answer) plan_cpu(a);
  return answer;
}

int ersde_plan_cuda(const ersde_plan_call* call, ersde_device* device, void* stream) {
  PlanArgs a{};
  if (const int answer = read(a, *call)) return answer;
  return launch(device, kPlanKernel, {(unsigned)a.num_steps, 1}, 32, &a, stream, false);
}

int64_t ersde_torch_threads(int64_t n, int64_t multiprocessors, int64_t threads_each) {
  return torch_threads(n, multiprocessors, threads_each);
}

int64_t ersde_torch_advance(int64_t n, int64_t threads, int64_t dtype) {
  return (int64_t)torch_advance(n, threads, static_cast<DType>(dtype));
}

void ersde_torch_noise(float* out, uint64_t seed, uint64_t offset, int64_t threads, int64_t first, int64_t n) {
  torch_noise_cpu(out, seed, offset, threads, first, n);
}

void ersde_box_muller(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n) { box_muller_cpu(a, b, z0, z1, n); }

const char* ersde_instruction_set(void) { return instruction_set_name(); }

int ersde_use_instruction_set(int set) { return use_instruction_set(static_cast<InstructionSet>(set)); }
