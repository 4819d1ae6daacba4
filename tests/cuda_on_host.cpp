// The extension with the CUDA kernels, run as C++, in the place of the CPU kernel: linked with csrc/binding.cpp by
// test_cuda_source.py, for cuda_on_host_cases.py.
#include <cstdio>
#include <cstdlib>

#include "../csrc/er_sde_step.h"
namespace ersde {
namespace {
struct LogProbVectorArgs;
struct LogProbSumsArgs;
}  // namespace
}  // namespace ersde
template <>
constexpr bool wait_for_each_other<ersde::LogProbArgs> = true;
template <>
constexpr bool wait_for_each_other<ersde::LogProbVectorArgs> = true;
template <>
constexpr bool wait_for_each_other<ersde::LogProbSumsArgs> = true;

#include "../csrc/er_sde_log_prob.cu"
#include "../csrc/er_sde_plan.cu"
#include "../csrc/er_sde_step.cu"

namespace ersde {

int multiprocessors = 1;
// In the place of the portable stream, where not 0 threads: torch's, its seed and most of its offset in memory, as a captured
// graph reads them, or given.
int64_t torch_seed, torch_offset, stream_threads = 0;
bool in_memory;

const char* instruction_set_name() { return "cuda on host"; }
bool use_instruction_set(InstructionSet) { return false; }

// With torch's stream in place of the portable one, where that is asked for.
void set_stream(StepArgs& a, bool batched) {
  if (!stream_threads || a.drawn.source != Noise::portable) return;
  a.drawn = Drawn{};
  a.drawn.source = Noise::torch;
  a.drawn.torch_threads = stream_threads;
  a.drawn.torch_offset = (uint64_t)torch_offset;
  a.drawn.seed = (uint64_t)torch_seed;
  static int64_t seed, offset;
  if (in_memory) {
    seed = torch_seed;
    offset = torch_offset - 4;
    a.drawn.torch_offset = 4;
    a.drawn.seed = 0;
    a.drawn.torch_seed_pointer = &seed;
    a.drawn.torch_offset_pointer = &offset;
  }
  a.batched = batched || a.rows.scales != nullptr;
  if (!a.batched && a.ndim == 2 && a.sizes[0] == 1) {  // one dimension, as binding.cpp gives torch's stream
    a.ndim = 1;
    a.sizes[0] = a.sizes[1];
    for (Operand* o : {&a.out, &a.denoised, &a.guide}) o->strides[0] = o->strides[1];
    for (Operand& o : a.terms) o.strides[0] = o.strides[1];
  }
}

void check(const char* error) {
  if (!error) return;
  std::fprintf(stderr, "%s\n", error);
  std::abort();
}

void step_cpu(const StepArgs& args, int64_t, int64_t) {
  StepArgs a = args;
  set_stream(a, false);
  check(step_cuda(a, {nullptr, multiprocessors, false}));
}

void log_prob_cpu(const LogProbArgs& args, int64_t, int64_t) {
  LogProbArgs a = args;
  set_stream(a.step, true);
  check(log_prob_cuda(a, {nullptr, multiprocessors, false}));
}

void log_prob_sums_cpu(const LogProbArgs&) {}  // a kernel does it

void plan_cpu(const PlanArgs& args) { plan_cuda(args, nullptr); }

void torch_noise_cpu(float* out, uint64_t seed, uint64_t offset, int64_t threads, int64_t first, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = torch_normal(seed, offset, (uint64_t)threads, (uint64_t)(first + i));
}

void box_muller_cpu(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n) {
  for (int64_t i = 0; i < n; ++i) box_muller(a[i], b[i], z0[i], z1[i]);
}

}  // namespace ersde

extern "C" __attribute__((visibility("default"))) void set_multiprocessors(int count) { ersde::multiprocessors = count; }
extern "C" __attribute__((visibility("default"))) void set_torch_stream(int64_t seed, int64_t offset, int64_t threads, bool in_memory) {
  ersde::torch_seed = seed;
  ersde::torch_offset = offset;
  ersde::stream_threads = threads;
  ersde::in_memory = in_memory;
}
