// The fused step on the CPU, compiled for several x86 instruction sets in one file and chosen when it first runs.
#include "er_sde_step.h"

#include <atomic>

namespace ersde {

namespace plain {
#include "er_sde_step_cpu_loop.h"
}

// GCC vectorises the loops for a wider instruction set under its target pragma; other compilers and processors (64-bit Arm
// has fma and vectors in its base set) take the plain loop. The same operations in the same order: the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ERSDE_X86 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace x86_64_v3 {
#include "er_sde_step_cpu_loop.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace x86_64_v4 {
#include "er_sde_step_cpu_loop.h"
}
#pragma GCC pop_options
#endif

namespace {

struct Kernels {
  const char* name;
  void (*step)(const StepArgs&, int64_t, int64_t);
  void (*torch_noise)(float*, uint64_t, uint64_t, int64_t, int64_t, int64_t);
  void (*box_muller)(const uint32_t*, const uint32_t*, float*, float*, int64_t);
};

const Kernels kPlain{"plain", plain::step, plain::torch_noise, plain::box_muller_row};
#ifdef ERSDE_X86
const Kernels kV3{"x86-64-v3", x86_64_v3::step, x86_64_v3::torch_noise, x86_64_v3::box_muller_row};
const Kernels kV4{"x86-64-v4", x86_64_v4::step, x86_64_v4::torch_noise, x86_64_v4::box_muller_row};
#endif

// nullptr where this processor lacks the instruction set.
const Kernels* find(InstructionSet set) {
#ifdef ERSDE_X86
  __builtin_cpu_init();
  const bool v4 = __builtin_cpu_supports("x86-64-v4"), v3 = __builtin_cpu_supports("x86-64-v3");
  switch (set) {
    case InstructionSet::best: return v4 ? &kV4 : v3 ? &kV3 : &kPlain;
    case InstructionSet::x86_64_v4: return v4 ? &kV4 : nullptr;
    case InstructionSet::x86_64_v3: return v3 ? &kV3 : nullptr;
    case InstructionSet::plain: return &kPlain;
  }
#endif
  return set == InstructionSet::best || set == InstructionSet::plain ? &kPlain : nullptr;
}

std::atomic<const Kernels*> chosen{find(InstructionSet::best)};

}  // namespace

const char* instruction_set_name() { return chosen.load()->name; }

bool use_instruction_set(InstructionSet set) {
  const Kernels* kernels = find(set);
  if (kernels) chosen = kernels;
  return kernels != nullptr;
}

void step_cpu(const StepArgs& args, int64_t begin, int64_t end) { chosen.load(std::memory_order_relaxed)->step(args, begin, end); }

void torch_noise_cpu(float* out, uint64_t seed, uint64_t offset, int64_t threads, int64_t first, int64_t n) {
  chosen.load(std::memory_order_relaxed)->torch_noise(out, seed, offset, threads, first, n);
}

void box_muller_cpu(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n) {
  chosen.load(std::memory_order_relaxed)->box_muller(a, b, z0, z1, n);
}

}  // namespace ersde
