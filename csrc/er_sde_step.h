// What a kernel is told: the tensors of one step as pointers and strides, and which row of which plan each sample steps by.
// No torch header.
#pragma once
#include "er_sde_std.h"

namespace ersde {

constexpr int kMaxDims = 12;  // x has fewer: portable noise may add an inner dimension of 1
constexpr int kMaxPredictions = 5;
constexpr int kMaxTerms = kMaxPredictions + 3;  // x, predictions, a guide that CFG++ adds, a noise tensor

// A row of a plan's table, as table.py has it: what every row holds, then w_d[0] ... w_d[order - 1].
enum Column : int {
  kCounter,  // of the portable noise
  kPX,       // of x and of the model's output in the prediction
  kPM,
  kWGuide,  // of the output without the condition, in the step by CFG++; else 0
  kWNoise,
  kWX,
  kWD,
};
constexpr int kMaxColumns = kWD + kMaxPredictions;

enum class DType : int32_t { float32, float64, bfloat16, float16 };

constexpr int size_of(DType t) {
  switch (t) {
    case DType::float64: return 8;
    case DType::float32: return 4;
    case DType::bfloat16:
    case DType::float16: return 2;
  }
  return 0;
}

struct Operand {
  char* data;
  int64_t strides[kMaxDims];  // in bytes
  DType dtype;
};

// Where the noise of the step comes from, beside a tensor, which is just another term.
enum class Noise : int32_t { none, portable, torch };

// Where the coefficients of a sample are found.
struct Rows {
  double row[kMaxColumns];    // the row of every sample; or, where there is a table
  const double* table;        // [num_plans, num_steps, num_columns] in the memory of the tensors, of which sample b has row
  const int64_t* plan_index;  // [plan_index[b index_stride], step_index[b index_stride]]; nullptr: the first plan, the first row
  const int64_t* step_index;
  int64_t index_stride;       // 0: one for all samples, 1: each its own
  int64_t num_plans, num_steps;
  int num_columns;
  int columns[kMaxTerms];     // of each term's weight; -1: there is no such term
  int predictions;            // that the terms hold; a row of the table that uses more makes NaN

  // From a model's output to its prediction, which takes the output's place as term 1:
  // denoised = p_x x + p_m (guide + scale (output - guide)), without a guide p_x x + p_m output.
  bool predicts;              // or term 1 is the prediction itself
  bool guided;
  double scale;
  const double* scales;       // one for each sample, or nullptr

  // Earlier predictions in a ring of `ring` slots, ring_stride bytes apart: that of step s in slot s mod ring. 0: no ring.
  int ring;
  int64_t ring_stride;
};

// What the noise that is drawn in the kernel depends on.
struct Drawn {
  Noise source;
  // Portable stream. Sample b draws with seeds[2 b], seeds[2 b + 1] = seed, sample; without seeds with `seed` and b.
  const int64_t* seeds;
  uint64_t seed;
  // Torch's stream, of element e in row-major order: as torch.randn on a card that runs torch_threads threads for it.
  // Where a graph is being captured, seed and offset are read from device memory.
  int64_t torch_threads;
  uint64_t torch_offset;
  const int64_t *torch_seed_pointer, *torch_offset_pointer;
};

struct StepArgs {
  int64_t numel;
  int ndim;                 // at least 1
  int64_t sizes[kMaxDims];
  bool batched;             // dimension 0 is the batch: samples differ in their rows or their noise
  int num_terms;
  Operand terms[kMaxTerms];  // x, predictions (or the model's output and earlier ones), noise
  Operand out;
  Operand denoised, guide;  // of a step that predicts
  bool float64;             // accumulate in float64
  Rows rows;
  Drawn drawn;
  int64_t position_strides[kMaxDims];  // portable stream: of the element in its whole sample, in elements; 0 for the batch
  int64_t first_position;
};

// Instruction sets of the CPU kernel; `best` is what this processor has.
enum class InstructionSet : int32_t { best, plain, x86_64_v3, x86_64_v4 };
const char* instruction_set_name();
bool use_instruction_set(InstructionSet set);

// Elements [begin, end) of the step, in row-major order of `sizes`.
void step_cpu(const StepArgs& args, int64_t begin, int64_t end);

// Elements [first, first + n) of what torch.randn draws on a CUDA device, to about 1e-6 (the device's own sine and logarithm).
void torch_noise_cpu(float* out, uint64_t seed, uint64_t offset, int64_t threads, int64_t first, int64_t n);

// Where a kernel is launched: on a cudaStream_t of a device with that many multiprocessors, early where the device can.
struct Launch {
  void* stream;
  int multiprocessors;
  bool early;
};

// The whole step on the current CUDA device; nullptr, or what the launch said.
const char* step_cuda(const StepArgs& args, const Launch& on);

// ---- the log-density of the Gaussian that a step draws from ----

// Positions of a sample that are summed together; and the lanes that add up what segments sum to. The order of every sum is fixed by
// them and by the size of a sample, so that its log-density has the same bits in any batch, on any device.
constexpr int kSegment = 1024, kSumLanes = 1024;

enum class Density : int32_t { of_step, of_sample, gradients };

struct LogProbArgs {
  StepArgs step;     // batched; its `out` is the next sample, which of_step writes and the others read
  Density what;
  bool mean;         // over the elements of a sample; or their sum
  double* log_prob;  // [batch]; of gradients what they are multiplied by
  double* sums;      // [batch, segments of a sample], for the kernels' own use
  Operand gradients[kMaxTerms + 2];  // with respect to each term, the guide and the next sample; without data those not wanted
};

// Of a sample of that many elements.
ERSDE_FN int64_t segments_of(int64_t size) { return (size + kSegment - 1) / kSegment; }

// Segments [begin, end) of all samples, and then the log-densities from their sums.
void log_prob_cpu(const LogProbArgs& args, int64_t begin, int64_t end);
void log_prob_sums_cpu(const LogProbArgs& args);

// All of it on the current CUDA device; as step_cuda.
const char* log_prob_cuda(const LogProbArgs& args, const Launch& on);

// Pairs of normals from pairs of words, for tests of words that Philox gives too rarely.
void box_muller_cpu(const uint32_t* a, const uint32_t* b, float* z0, float* z1, int64_t n);

}  // namespace ersde
