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
enum class Noise : int32_t { none, portable, torch };

struct StepArgs {
  int64_t numel;
  int ndim;                 // at least 1; with portable noise dimension 0 is the batch
  int64_t sizes[kMaxDims];
  int num_terms;
  Operand terms[kMaxTerms];
  double weights[kMaxTerms];
  Operand out;
  bool float64;             // accumulate in float64

  // Device only, for captured graphs: the weights are row *row of this table in device memory, term k in column columns[k]
  // and the noise in the last; a term whose weight there is 0 is not read. nullptr: `weights` and `w_noise` count.
  const double* table;
  const int64_t* row;
  int num_columns;
  int columns[kMaxTerms];

  Noise noise;
  double w_noise;
  // Portable stream. Sample b draws with seeds[2 b], seeds[2 b + 1] = seed, sample; without seeds with `seed` and b.
  int64_t position_strides[kMaxDims];  // of the element in its whole sample, in elements; 0 for the batch
  int64_t first_position;
  const int64_t* seeds;
  uint64_t seed;
  uint32_t step;            // with `row`, of row 0
  // Torch's stream, of element e in row-major order: as torch.randn on a card that runs torch_threads threads for it.
  // Where a graph is being captured, seed and offset are read from device memory.
  int64_t torch_threads;
  uint64_t torch_offset;
  const int64_t *torch_seed_pointer, *torch_offset_pointer;
};

// Instruction sets of the CPU kernel; `best` is what this processor has.
enum class InstructionSet : int32_t { best, plain, x86_64_v3, x86_64_v4 };
const char* instruction_set_name();
bool use_instruction_set(InstructionSet set);

// Elements [begin, end) of the step, in row-major order of `sizes`.
void step_cpu(const StepArgs& args, int64_t begin, int64_t end);

// Elements [first, first + n) of what torch.randn draws on a CUDA device, to about 1e-6 (the device's own sine and logarithm).
void torch_noise_cpu(float* out, uint64_t seed, uint64_t offset, int64_t threads, int64_t first, int64_t n);

// The whole step on the current CUDA device; nullptr, or what the launch said. `stream` is a cudaStream_t.
const char* step_cuda(const StepArgs& args, int multiprocessors, void* stream);

// Pairs of normals from pairs of words, for tests of words that Philox gives too rarely.
void box_muller_cpu(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n);

}  // namespace ersde
