// The fused step on the CPU, compiled for several x86 instruction sets in one file and chosen when it first runs.
#include "er_sde_step.h"

#include <atomic>

#ifdef __x86_64__
#include <cpuid.h>
#endif

// What a loop writes it does not read again, though it may write where it has read: out may be an input.
#ifdef __clang__
#define ERSDE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define ERSDE_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace ersde {

namespace plain {
#include "er_sde_step_cpu_loop.h"
#include "er_sde_log_prob_cpu_loop.h"
}

// On x86-64 the loops once more for each wider instruction set: the same operations in the same order, the same bits. Elsewhere
// the plain loop is the best there is: 64-bit Arm has fma and vectors in its base set.
#ifdef __x86_64__
#ifdef __clang__  // features by name, as zig turns off by name what its base set lacks, and without the bound of v4 to 256 bits
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,lzcnt,movbe,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#endif
namespace x86_64_v3 {
#include "er_sde_step_cpu_loop.h"
#include "er_sde_log_prob_cpu_loop.h"
}
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,lzcnt,movbe,f16c,"                    \
                                                   "avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif
namespace x86_64_v4 {
#include "er_sde_step_cpu_loop.h"
#include "er_sde_log_prob_cpu_loop.h"
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

struct Kernels {
  const char* name;
  void (*step)(const StepArgs&, int64_t, int64_t);
  void (*log_prob)(const LogProbArgs&, int64_t, int64_t);
  void (*torch_noise)(float*, uint64_t, uint64_t, int64_t, int64_t, int64_t);
  void (*box_muller)(const uint32_t*, const uint32_t*, float*, float*, int64_t);
};

const Kernels kPlain{"plain", plain::step, plain::log_prob, plain::torch_noise, plain::box_muller_row};
#ifdef __x86_64__
const Kernels kV3{"x86-64-v3", x86_64_v3::step, x86_64_v3::log_prob, x86_64_v3::torch_noise, x86_64_v3::box_muller_row};
const Kernels kV4{"x86-64-v4", x86_64_v4::step, x86_64_v4::log_prob, x86_64_v4::torch_noise, x86_64_v4::box_muller_row};
#endif

#ifdef __x86_64__
// The level of the x86-64 psABI: 1, 3 or 4. Not by __builtin_cpu_supports, which knows the levels in few compilers.
int x86_64_level() {
  unsigned a, b, c, d, ignored;
  const auto has = [](unsigned bits, unsigned needed) { return (bits & needed) == needed; };
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C | bit_MOVBE)) return 1;
  unsigned saved;  // registers that the operating system keeps
  __asm__("xgetbv" : "=a"(saved), "=d"(ignored) : "c"(0));
  if (!has(saved, 0x06) || !__get_cpuid(0x80000001, &a, &b, &c, &d) || !has(c, 1u << 5 /* LZCNT */)) return 1;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, bit_AVX2 | bit_BMI | bit_BMI2)) return 1;
  return has(saved, 0xE6) && has(b, bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL) ? 4 : 3;
}

const int kLevel = x86_64_level();
#endif

// nullptr where this processor lacks the instruction set.
const Kernels* find(InstructionSet set) {
#ifdef __x86_64__
  const bool v4 = kLevel >= 4, v3 = kLevel >= 3;
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

void log_prob_cpu(const LogProbArgs& args, int64_t begin, int64_t end) {
  chosen.load(std::memory_order_relaxed)->log_prob(args, begin, end);
}

void log_prob_sums_cpu(const LogProbArgs& a) {
  const int64_t size = a.step.numel / a.step.sizes[0], segments = segments_of(size);
  for (int64_t b = 0; b < a.step.sizes[0]; ++b) {
    const double* sums = a.sums + b * segments;
    double lanes[kSumLanes] = {};
    for (int64_t s = 0; s < segments; ++s) lanes[s % kSumLanes] += sums[s];
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    a.log_prob[b] = plain::log_prob_of(plain::gaussian_of(a.step.rows, b), lanes[0], size, a.mean);
  }
}

void torch_noise_cpu(float* out, uint64_t seed, uint64_t offset, int64_t threads, int64_t first, int64_t n) {
  chosen.load(std::memory_order_relaxed)->torch_noise(out, seed, offset, threads, first, n);
}

void box_muller_cpu(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n) {
  chosen.load(std::memory_order_relaxed)->box_muller(a, b, z0, z1, n);
}

}  // namespace ersde
