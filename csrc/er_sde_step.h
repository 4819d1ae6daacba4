// What a kernel is told: the tensors of one step as pointers, strides and weights. No torch header.
#pragma once
#include <cstdint>

namespace ersde {

constexpr int kMaxDims = 12;  // x has fewer: portable noise may add an inner dimension of 1
constexpr int kMaxPredictions = 5;
constexpr int kMaxTerms = kMaxPredictions + 2;  // x, predictions, a noise tensor

enum class DType : int32_t { float32, float64, bfloat16, float16 };

constexpr int size_of(DType t) { return t == DType::float64 ? 8 : t == DType::float32 ? 4 : 2; }

struct Operand {
  char* data;
  int64_t strides[kMaxDims];  // in bytes
  DType dtype;
};

// Where the noise of the step comes from, beside a tensor, which is just another term.
enum class Noise : int32_t { none, portable };

struct StepArgs {
  int64_t numel;
  int ndim;                 // at least 1; with portable noise dimension 0 is the batch
  int64_t sizes[kMaxDims];
  int num_terms;
  Operand terms[kMaxTerms];
  double weights[kMaxTerms];
  Operand out;
  bool float64;             // accumulate in float64

  Noise noise;
  double w_noise;
  // Portable stream. Sample b draws with seeds[2 b], seeds[2 b + 1] = seed, sample; without seeds with `seed` and b.
  int64_t position_strides[kMaxDims];  // of the element in its whole sample, in elements; 0 for the batch
  int64_t first_position;
  const int64_t* seeds;
  uint64_t seed;
  uint32_t step;
};

// Instruction sets of the CPU kernel; `best` is what this processor has.
enum class InstructionSet : int32_t { best, plain, x86_64_v3, x86_64_v4 };
const char* instruction_set_name();
bool use_instruction_set(InstructionSet set);

// Elements [begin, end) of the step, in row-major order of `sizes`.
void step_cpu(const StepArgs& args, int64_t begin, int64_t end);

// Normals [first, first + n) of a sample of the portable stream.
void portable_noise_cpu(float* out, uint64_t seed, uint32_t step, uint64_t sample, uint64_t first, int64_t n);

// Pairs of normals from pairs of words, for tests of words that Philox gives too rarely.
void box_muller_cpu(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n);

}  // namespace ersde
