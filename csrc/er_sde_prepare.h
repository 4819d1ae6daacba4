// What is prepared of a step before a kernel starts: shapes and strides, and for a GPU which kernel runs on what grid with which
// arguments. No torch header and none of CUDA's, so that any launcher can call it.
#pragma once
#include <algorithm>
#include <array>

#include "er_sde_step.h"

namespace ersde {
namespace {

#include "er_sde_math.h"
#include "er_sde_rows.h"
#include "er_sde_vectors.h"

constexpr int kMaxOperands = kMaxTerms + 3;  // out, and of a step that predicts the prediction and the guide
constexpr int kMaxViews = 2 * kMaxOperands;  // and gradients of them

// A tensor's strides, in elements, and what the kernel is told of it.
struct View {
  const int64_t* strides;
  Operand* operand;
};

// The shape of a whole sample and where x starts in it, without the batch; nullptr where x is whole.
struct Whole {
  const int64_t *shape, *start;
};

inline bool is_contiguous(const int64_t* sizes, const int64_t* strides, int dims) {
  int64_t expected = 1;
  for (int d = dims - 1; d >= 0; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// Sizes, and strides of every operand (out last), adjacent dimensions merged where all allow it. A drawn stream and a log-density
// count positions, so the order of the dimensions is kept; where samples differ the batch stays dimension 0 too. Otherwise dimensions
// are ordered by the strides of out, so that channels_last is walked as it lies.
inline void set_shape(StepArgs& a, const View* views, int count, const int64_t* sizes, int dims, const Whole& whole, bool sums = false) {
  const bool portable = a.drawn.source == Noise::portable;
  const int64_t* out_strides = views[count - 1].strides;
  std::array<int, kMaxDims> order{};
  int kept = 0;
  for (int d = 0; d < dims; ++d) {
    if (sizes[d] != 1 || (a.batched && d == 0)) order[kept++] = d;
  }
  if (a.drawn.source == Noise::none && !sums && !is_contiguous(sizes, out_strides, dims)) {
    const auto longer = [&](int i, int j) { return out_strides[i] > out_strides[j]; };
    const auto first = order.begin() + (a.batched && kept > 0);
    for (auto it = first; it < order.begin() + kept; ++it) std::rotate(std::upper_bound(first, it, *it, longer), it, it + 1);
  }
  std::array<int64_t, kMaxDims> position{};
  a.first_position = 0;
  if (portable) {
    int64_t stride = 1;
    for (int d = dims - 1; d >= 1; --d) {
      position[d] = stride;
      a.first_position += stride * (whole.start ? whole.start[d - 1] : 0);
      stride *= whole.shape ? whole.shape[d - 1] : sizes[d];
    }
  }
  const auto stride_of = [](const View& v, int d) { return v.strides[d] * size_of(v.operand->dtype); };
  a.ndim = 0;
  for (int n = 0; n < kept; ++n) {
    const int d = order[n], last = a.ndim - 1;
    bool merges = a.ndim > (a.batched ? 1 : 0) && a.position_strides[last] == sizes[d] * position[d];
    for (int k = 0; k < count; ++k) merges = merges && views[k].operand->strides[last] == sizes[d] * stride_of(views[k], d);
    const int at = merges ? last : a.ndim++;
    a.sizes[at] = merges ? a.sizes[at] * sizes[d] : sizes[d];
    a.position_strides[at] = position[d];
    for (int k = 0; k < count; ++k) views[k].operand->strides[at] = stride_of(views[k], d);
  }
  // Scalars get a dimension; a batch a second one, along which neighbours in the row are neighbours in the sample.
  while (a.ndim < (a.batched ? 2 : 1) || (portable && a.position_strides[a.ndim - 1] != 1)) {
    a.sizes[a.ndim] = 1;
    a.position_strides[a.ndim] = portable;
    for (int k = 0; k < count; ++k) views[k].operand->strides[a.ndim] = size_of(views[k].operand->dtype);
    ++a.ndim;
  }
}

// ---- which kernel of er_sde_step.cu runs, and how ----

// Threads that torch.randn runs for n elements on a card, and how far it advances the generator's offset.
inline int64_t torch_threads(int64_t n, int64_t multiprocessors, int64_t threads_each) {
  return 256 * std::min((n + 255) / 256, multiprocessors * (threads_each / 256));
}
inline uint64_t torch_advance(int64_t n, int64_t threads, DType dtype) {
  const int64_t unroll = dtype == DType::float64 ? 2 : 4;
  return (uint64_t)((n - 1) / (threads * unroll) + 1) * 4;
}

constexpr int kMaxVectorTerms = kMaxPredictions + 2;  // with the noise; beyond them step_elements runs: order 5 with CFG++ and noise
constexpr int kBlocksPerMultiprocessor = 1024;  // on an H100 64 lose 2 %, 16 another 2, and no bound gains less than 1 %

// A kernel by the arguments of its template, its grid in blocks of kThreads, and its one argument.
struct StepLaunch {
  bool vectors;     // step_vectors<T, K, Source, Predicts>, or with torch's stream step_vectors_torch<T, K, Predicts>, of `vector`;
  DType dtype;      // T
  int terms;        // K
  Noise source;
  bool predicts;
  bool float64;     // else step_elements<A, I> of `elements`: A is double or float,
  bool large;       // I 64 or 32 bits wide
  unsigned grid[2];
  VectorArgs vector;
  const StepArgs* elements;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether an operand can be read as 16 bytes at a time: of that type, contiguous and aligned; or there is none.
inline bool fits_vectors(const Operand& o, const StepArgs& a) {
  int64_t expected = size_of(a.out.dtype);
  if (!o.data) return true;
  if (o.dtype != a.out.dtype || (uintptr_t)o.data % 16 != 0) return false;
  for (int d = a.ndim - 1; d >= 0; --d) {
    if (a.sizes[d] != 1 && o.strides[d] != expected) return false;
    expected *= a.sizes[d];
  }
  return true;
}
inline bool operands_fit_vectors(const StepArgs& a) {
  if (a.out.dtype == DType::float64 || a.float64 || a.num_terms == 0 || a.rows.ring_stride % 16 != 0) return false;
  for (int k = 0; k < a.num_terms; ++k) {
    if (!fits_vectors(a.terms[k], a)) return false;
  }
  return fits_vectors(a.out, a) && fits_vectors(a.denoised, a) && fits_vectors(a.guide, a);
}

// Rows of a sample that lie behind each other, though their positions in the whole sample do not: of a shard.
inline int64_t rows_of_sample(const StepArgs& a) { return a.batched && a.ndim == 3 ? a.sizes[1] : 1; }

// Whether step_vectors can run this: one 2- or 4-byte type, contiguous and aligned; where samples differ, whole rows of them, and
// not torch's stream, which runs across them.
inline bool fits_vectors(const StepArgs& a) {
  const int64_t vector = 16 / size_of(a.out.dtype);
  if (a.num_terms + (a.drawn.source != Noise::none) > kMaxVectorTerms) return false;
  if (a.batched) {
    const int64_t rows = a.sizes[0] * rows_of_sample(a);
    if (rows != 1 && a.drawn.source == Noise::torch) return false;
    if (a.ndim > 3 || a.first_position % 4 != 0 || (a.ndim == 3 && a.position_strides[1] % 4 != 0)) return false;
    if (rows != 1 && (a.sizes[a.ndim - 1] % vector != 0 || rows > 65535)) return false;
  } else if (a.ndim != 1) {
    return false;
  }
  return operands_fit_vectors(a);
}

inline VectorArgs vector_args_of(const StepArgs& a) {
  VectorArgs v{};
  for (int k = 0; k < a.num_terms; ++k) v.terms[k] = a.terms[k].data;
  v.guide = a.guide.data;
  v.denoised = a.denoised.data;
  v.out = a.out.data;
  v.size = a.batched ? a.sizes[a.ndim - 1] : a.numel;
  v.rows_of_sample = (unsigned)rows_of_sample(a);
  v.first_group = a.first_position / 4;
  v.groups_between_rows = a.ndim == 3 ? a.position_strides[1] / 4 : 0;
  v.rows = a.rows;
  v.drawn = a.drawn;
  if (known_to_host(a.rows)) v.coefficients = coefficients_of<float, kMaxTerms>(a.rows, 0);
  return v;
}

// The launch of a step on a device with that many multiprocessors; the arguments stay the caller's.
inline StepLaunch launch_of(const StepArgs& a, int multiprocessors) {
  StepLaunch l{};
  const int64_t most = (int64_t)multiprocessors * kBlocksPerMultiprocessor;
  l.vectors = fits_vectors(a);
  if (!l.vectors) {
    l.float64 = a.float64;
    l.large = a.numel >= (int64_t{1} << 32);
    l.grid[0] = (unsigned)std::min(ceil_div(a.numel, kThreads), most);
    l.grid[1] = 1;
    l.elements = &a;
    return l;
  }
  l.dtype = a.out.dtype;
  l.terms = a.num_terms;
  l.source = a.drawn.source;
  l.predicts = a.rows.predicts;
  l.vector = vector_args_of(a);
  const int64_t each = 16 / size_of(l.dtype);
  if (l.source == Noise::torch) {
    const int64_t across = ceil_div(a.drawn.torch_threads / each, kThreads), blocks = ceil_div(l.vector.size, 4 * a.drawn.torch_threads);
    l.grid[0] = (unsigned)across;
    l.grid[1] = (unsigned)std::min(blocks, ceil_div(most, across));
  } else {
    const int64_t rows = a.batched ? a.sizes[0] * rows_of_sample(a) : 1;
    l.grid[0] = (unsigned)std::min(ceil_div(ceil_div(l.vector.size, each), kThreads), ceil_div(most, rows));
    l.grid[1] = (unsigned)rows;
  }
  return l;
}

constexpr int kFewTerms = 5;  // for which log_prob_vectors is compiled beside the most: x, three predictions, and one more

// The two launches of a log-density.
struct LogProbLaunch {
  bool vectors;  // log_prob_vectors<T, K, Density, Noise> of `vector`; or log_prob_elements<A> of `elements`, A double or float
  DType dtype;
  int terms;  // K
  Density what;
  Noise source;
  bool float64;
  unsigned grid[2];
  LogProbVectorArgs vector;
  const LogProbArgs* elements;
  bool sums;  // whether log_prob_sums of `last` follows, in a block for each sample
  LogProbSumsArgs last;
};

// Samples whose positions are groups of four, of one 2- or 4-byte type, contiguous and aligned.
inline bool fits_vectors(const LogProbArgs& a) {
  const StepArgs& s = a.step;
  if (s.ndim != 2 || s.first_position != 0 || s.sizes[1] % 4 != 0 || !operands_fit_vectors(s)) return false;
  return std::all_of(std::begin(a.gradients), std::end(a.gradients), [&](const Operand& o) { return fits_vectors(o, s); });
}

inline LogProbLaunch launch_of(const LogProbArgs& a, int multiprocessors) {
  const StepArgs& s = a.step;
  const int64_t batch = s.sizes[0], size = s.numel / batch, segments = segments_of(size);
  const int64_t most = (int64_t)multiprocessors * kBlocksPerMultiprocessor;
  LogProbLaunch l{};
  if (known_to_host(s.rows)) l.last.gaussian = l.vector.gaussian = gaussian_of(s.rows, 0);
  l.vectors = fits_vectors(a);
  l.what = a.what;
  l.float64 = s.float64;
  l.elements = &a;
  l.dtype = s.out.dtype;
  l.terms = s.num_terms <= kFewTerms ? kFewTerms : kMaxTerms;
  l.source = a.what == Density::of_step ? s.drawn.source : Noise::none;
  if (l.vectors) {
    l.vector.step = vector_args_of(s);
    l.vector.num_terms = s.num_terms;
    l.vector.batch = batch;
    l.vector.log_prob = a.log_prob;
    l.vector.sums = a.sums;
    for (int k = 0; k < kMaxTerms + 2; ++k) l.vector.gradients[k] = a.gradients[k].data;
  }
  // From there on warps that wait for no other keep every multiprocessor busy.
  l.vector.by_warps = batch * segments >= 64 * multiprocessors;
  l.grid[0] = (unsigned)std::min(l.vectors && l.vector.by_warps ? ceil_div(segments, 8) : segments, most);
  l.grid[1] = (unsigned)std::min({batch, ceil_div(most, l.grid[0]), int64_t{65535}});
  l.sums = a.what != Density::gradients;
  l.last.rows = s.rows;
  l.last.sums = a.sums;
  l.last.log_prob = a.log_prob;
  l.last.size = size;
  l.last.mean = a.mean;
  return l;
}

}  // namespace
}  // namespace ersde
