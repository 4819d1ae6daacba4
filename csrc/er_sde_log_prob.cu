// The log-density of a step on CUDA, with the step in one pass, of a sample that is given, or its gradients.
//
//   log_prob_vectors   samples of one 2- or 4-byte type, contiguous and aligned: a thread owns four neighbours;
//   log_prob_elements  everything else, one element at a time;
//   log_prob_sums      what both leave of each segment, added up.
// A block sums a segment of 1,024 positions in float64: four neighbours in a thread, the warps' threads one warp after another, then
// halves of the warp. csrc/er_sde_log_prob_cpu_loop.h has the same order, and log_prob.py.
#include "er_sde_elements.h"

namespace ersde {
namespace {

constexpr int kWarps = kThreads / 32;
static_assert(4 * kThreads == kSegment && kWarps == 8);

// Four neighbours, read and written at once.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};
template <typename T>
__device__ __forceinline__ Four<T> load_four(const void* p, int64_t group) {
  return static_cast<const Four<T>*>(p)[group];
}

// mean + weight * each.
template <typename T>
__device__ __forceinline__ void add_four(double (&mean)[4], double weight, const Four<T>& term) {
#pragma unroll
  for (int j = 0; j < 4; ++j) mean[j] = add_(mean[j], mul_(weight, (double)load(&term.at[j])));
}

__device__ __forceinline__ double quad_of(const double (&r)[4]) {
  return add_(add_(mul_(r[0], r[0]), mul_(r[1], r[1])), add_(mul_(r[2], r[2]), mul_(r[3], r[3])));
}

// The sum of a warp's lanes, in the first of them.
__device__ __forceinline__ double sum_of_warp(double lane) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) lane = add_(lane, __shfl_down_sync(0xFFFFFFFFu, lane, half));
  return lane;
}

// Writes the sum of a segment from the quads of a block's threads, all of which call it; turn changes from call to call, so that
// one barrier is enough.
__device__ __forceinline__ void sum_segment(double quad, int turn, double* sum) {
  __shared__ double quads[2][kThreads];
  quads[turn][threadIdx.x] = quad;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  double lane = quads[turn][threadIdx.x];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) lane = add_(lane, quads[turn][32 * warp + threadIdx.x]);
  lane = sum_of_warp(lane);
  if (threadIdx.x == 0) *sum = lane;
}

// The normals of four neighbours, from position p of sample b on; what is drawn is rounded as the step rounds it.
template <typename T, Noise Source>
__device__ __forceinline__ void draw_four(float (&z)[4], const VectorArgs& a, const TorchState& torch, uint32_t counter, int64_t b,
                                          int64_t p) {
  if constexpr (Source == Noise::portable) {
    const uint64_t seed = a.drawn.seeds ? (uint64_t)a.drawn.seeds[2 * b] : a.drawn.seed;
    const uint64_t sample = a.drawn.seeds ? (uint64_t)a.drawn.seeds[2 * b + 1] : (uint64_t)b;
    portable_normals(keys_of(seed), portable_counter((uint64_t)p / 4, counter, sample), z[0], z[1], z[2], z[3]);
  } else if constexpr (Source == Noise::torch) {
    // Four neighbours are one place of neighbouring subsequences: 256 divides the threads.
    const TorchPlace at = torch_place((uint64_t)(b * a.size + p), (uint64_t)a.drawn.torch_threads, 4);
    const Keys keys = keys_of(torch.seed);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Words w = torch_words(keys, torch.offset, at.block, at.subsequence + j);
      float z0, z1;
      torch_pair(at.place < 2 ? w.x : w.z, at.place < 2 ? w.y : w.w, z0, z1);
      z[j] = at.place % 2 ? z1 : z0;
      if constexpr (sizeof(T) == 2) z[j] = rounded(z[j], T());
    }
  }
}

// What the threads of a block know of a sample, in shared memory, since it would fill their registers.
struct SampleDensity {
  Gaussian gaussian;
  Coefficients<float> c;
  double of_density;  // what gradients are multiplied by, over the standard deviation
  unsigned in_mean, in_step, predicts, read;  // bits of the terms, kGuide the guide's
};
constexpr int kGuide = kMaxTerms;

__device__ __forceinline__ void look_at_sample(SampleDensity& d, const LogProbVectorArgs& a, int64_t b, bool gradients) {
  const Rows& rows = a.step.rows;
  d.gaussian = known_to_host(rows) ? a.gaussian : gaussian_of(rows, b);
  d.c = known_to_host(rows) ? a.step.coefficients : coefficients_of<float, kMaxTerms>(rows, b);
  d.in_mean = d.in_step = d.predicts = 0;
  for (int k = 0; k < a.num_terms; ++k) {
    d.in_mean |= (unsigned)(d.gaussian.w[k] != 0) << k;
    d.in_step |= (unsigned)(d.c.w[k] != 0) << k;
  }
  d.in_mean |= (unsigned)(d.gaussian.guide != 0) << kGuide;
  if (rows.predicts) {
    for (int k = 0; k < 3; ++k) d.predicts |= (unsigned)(d.c.p[k] != 0) << (k == 2 ? kGuide : k);
  }
  d.read = d.in_mean | d.predicts | (d.in_step & ~(unsigned)(rows.predicts << 1));  // the prediction is made, not read
  if (gradients) d.of_density = mul_(a.log_prob[b], d.gaussian.inverse);
}

// A segment is a block's, a turn for each warp; or, where there are enough of them, a warp's, which takes all eight turns and waits for
// no other. Either way a lane adds up the same quads in the same order. K: as many terms as there can be.
template <typename T, int K, Density What, Noise Source>
__global__ void __launch_bounds__(kThreads, K == kMaxTerms || What == Density::gradients ? 2 : 3)
    log_prob_vectors(const __grid_constant__ LogProbVectorArgs a) {
  __shared__ SampleDensity d;
  const VectorArgs& s = a.step;
  let_the_kernel_behind_start();
  wait_for_the_kernel_before();
  const bool predicts = s.rows.predicts;
  const int64_t groups = s.size / 4, segments = segments_of(s.size);
  const TorchState torch = Source == Noise::torch ? torch_state(s.drawn) : TorchState{};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int turn_of_block = 0;
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    __syncthreads();
    if (threadIdx.x == 0) look_at_sample(d, a, b, What == Density::gradients);
    __syncthreads();
    const int64_t first_segment = a.by_warps ? (int64_t)blockIdx.x * kWarps + warp : blockIdx.x;
    for (int64_t segment = first_segment; segment < segments; segment += (int64_t)gridDim.x * (a.by_warps ? kWarps : 1)) {
      double sum = 0;
      const int first = a.by_warps ? 0 : warp, last = a.by_warps ? kWarps : warp + 1;
#pragma unroll 1
      for (int turn = first; turn < last; ++turn) {
        const int64_t group = segment * kThreads + 32 * turn + lane, at = b * groups + group;
        if (group >= groups) break;
        Four<T> term[K], guide, next;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (d.read >> k & 1) term[k] = load_four<T>(s.terms[k], at);
        }
        if (d.read >> kGuide & 1) guide = load_four<T>(s.guide, at);
        if constexpr (What != Density::of_step) next = load_four<T>(s.out, at);
        float z[4] = {};
        if constexpr (Source != Noise::none) draw_four<T, Source>(z, s, torch, d.c.counter, b, 4 * group);
        double residual[4] = {};
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (d.in_mean >> k & 1) add_four(residual, d.gaussian.w[k], term[k]);
        }
        if (d.in_mean >> kGuide & 1) add_four(residual, d.gaussian.guide, guide);
        if constexpr (What == Density::of_step) {
          float y[4] = {-0.0f, -0.0f, -0.0f, -0.0f};
          const auto add = [&](float w, const Four<T>& values) {
#pragma unroll
            for (int j = 0; j < 4; ++j) y[j] = fma_(w, load(&values.at[j]), y[j]);
          };
          if (predicts) {
            if (d.predicts & 1) add(d.c.p[0], term[0]);
            if (d.predicts & 2) add(d.c.p[1], term[1]);
            if (d.predicts >> kGuide & 1) add(d.c.p[2], guide);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              store(&term[1].at[j], y[j]);
              y[j] = -0.0f;
            }
            static_cast<Four<T>*>(s.denoised)[at] = term[1];
          }
#pragma unroll
          for (int k = 0; k < K; ++k) {
            if (d.in_step >> k & 1) add(d.c.w[k], term[k]);
          }
          const bool draws = Source != Noise::none && d.c.noise != 0;
#pragma unroll
          for (int j = 0; j < 4; ++j) store(&next.at[j], draws ? fma_(d.c.noise, z[j], y[j]) : y[j]);
          static_cast<Four<T>*>(s.out)[at] = next;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) residual[j] = mul_(add_((double)load(&next.at[j]), -residual[j]), d.gaussian.inverse);
        if constexpr (What == Density::gradients) {
          const auto put = [&](void* to, double w) {
            if (!to) return;
            const double factor = mul_(d.of_density, w);
            Four<T> gradient;
#pragma unroll
            for (int j = 0; j < 4; ++j) store(&gradient.at[j], (float)mul_(factor, residual[j]));
            static_cast<Four<T>*>(to)[at] = gradient;
          };
#pragma unroll
          for (int k = 0; k < kMaxTerms; ++k) put(a.gradients[k], d.gaussian.w[k]);
          put(a.gradients[kMaxTerms], d.gaussian.guide);
          put(a.gradients[kMaxTerms + 1], -1);
        } else {
          sum = turn == first ? quad_of(residual) : add_(sum, quad_of(residual));
        }
      }
      if constexpr (What != Density::gradients) {
        double* to = a.sums + b * segments + segment;
        if (a.by_warps) {
          sum = sum_of_warp(sum);
          if (lane == 0) *to = sum;
        } else {
          sum_segment(sum, turn_of_block, to);
          turn_of_block ^= 1;
        }
      }
    }
  }
}

// Element e of an operand, in float64.
__device__ __forceinline__ double wide(const Operand& o, int64_t bytes) { return load_any<double>(o.data + bytes, o.dtype); }

template <typename A>
__global__ void __launch_bounds__(kThreads) log_prob_elements(const __grid_constant__ LogProbArgs a) {
  const StepArgs& s = a.step;
  let_the_kernel_behind_start();
  wait_for_the_kernel_before();
  const int slot = ring_slot(s.rows);
  const TorchState torch = torch_state(s.drawn);
  const int64_t size = s.numel / s.sizes[0], segments = segments_of(size);
  int turn = 0;
  for (int64_t b = blockIdx.y; b < s.sizes[0]; b += gridDim.y) {
    const Gaussian g = gaussian_of(s.rows, b);
    const auto c = coefficients_of<A, kMaxTerms>(s.rows, b);
    for (int64_t segment = blockIdx.x; segment < segments; segment += gridDim.x) {
      double residual[4] = {};
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        const int64_t p = segment * kSegment + 4 * threadIdx.x + j, e = b * size + p;
        if (p >= size) break;
        const Place at = place_of<uint64_t>(s, slot, e);
        if (a.what == Density::of_step) step_element(s, c, at, slot, torch, e);
        double mean = 0;
#pragma unroll
        for (int k = 0; k < kMaxTerms; ++k) {
          if (k >= s.num_terms || g.w[k] == 0) continue;
          mean = add_(mean, mul_(g.w[k], wide(s.terms[k], at.terms[k] + term_offset(s.rows, slot, k))));
        }
        if (g.guide != 0) mean = add_(mean, mul_(g.guide, wide(s.guide, at.guide)));
        const double r = mul_(add_(wide(s.out, at.out), -mean), g.inverse);
        if (a.what != Density::gradients) {
          residual[0] = j == 0 ? r : residual[0];
          residual[1] = j == 1 ? r : residual[1];
          residual[2] = j == 2 ? r : residual[2];
          residual[3] = j == 3 ? r : residual[3];
          continue;
        }
        const double of_density = mul_(a.log_prob[b], g.inverse);
        const auto put = [&](const Operand& o, double w) {
          if (!o.data) return;
          int64_t offset = 0, rest = e;
          for (int d = s.ndim - 1; d >= 0; --d) {
            offset += (d ? rest % s.sizes[d] : rest) * o.strides[d];
            rest /= s.sizes[d];
          }
          store_any<double>(o.data + offset, o.dtype, mul_(mul_(of_density, w), r));
        };
#pragma unroll
        for (int k = 0; k < kMaxTerms; ++k) put(a.gradients[k], g.w[k]);
        put(a.gradients[kMaxTerms], g.guide);
        put(a.gradients[kMaxTerms + 1], -1);
      }
      if (a.what == Density::gradients) continue;
      sum_segment(quad_of(residual), turn, a.sums + b * segments + segment);
      turn ^= 1;
    }
  }
}

// blockIdx.x is the sample.
__global__ void __launch_bounds__(kSumLanes) log_prob_sums(const __grid_constant__ LogProbSumsArgs a) {
  __shared__ double lanes[kSumLanes];
  let_the_kernel_behind_start();
  wait_for_the_kernel_before();
  const int64_t b = blockIdx.x, segments = segments_of(a.size);
  double lane = 0;
  for (int64_t segment = threadIdx.x; segment < segments; segment += kSumLanes) lane = add_(lane, a.sums[b * segments + segment]);
  lanes[threadIdx.x] = lane;
  for (unsigned half = kSumLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lanes[threadIdx.x] = add_(lanes[threadIdx.x], lanes[threadIdx.x + half]);
  }
  if (threadIdx.x > 0) return;
  const Gaussian g = known_to_host(a.rows) ? a.gaussian : gaussian_of(a.rows, b);
  a.log_prob[b] = log_prob_of(g, lanes[0], a.size, a.mean);
}

}  // namespace

#ifndef __CUDACC_RTC__  // the launches
namespace {

template <typename T, int K>
void launch_vectors(const LogProbLaunch& l, const Launch& on) {
  const auto launch = [&](auto kernel) {
    ERSDE_LAUNCH(kernel, dim3(l.grid[0], l.grid[1]), dim3(kThreads), on.stream, l.vector, on.early);
  };
  switch (l.what) {
    case Density::of_sample: return launch(log_prob_vectors<T, K, Density::of_sample, Noise::none>);
    case Density::gradients: return launch(log_prob_vectors<T, K, Density::gradients, Noise::none>);
    case Density::of_step: break;
  }
  switch (l.source) {
    case Noise::none: return launch(log_prob_vectors<T, K, Density::of_step, Noise::none>);
    case Noise::portable: return launch(log_prob_vectors<T, K, Density::of_step, Noise::portable>);
    case Noise::torch: return launch(log_prob_vectors<T, K, Density::of_step, Noise::torch>);
  }
}

void launch_vectors(const LogProbLaunch& l, const Launch& on) {
  with_vector_type(l.dtype, [&](auto number) {
    using T = decltype(number);
    l.terms == kMaxTerms ? launch_vectors<T, kMaxTerms>(l, on) : launch_vectors<T, kFewTerms>(l, on);
  });
}

}  // namespace

const char* log_prob_cuda(const LogProbArgs& a, const Launch& on) {
  const LogProbLaunch l = launch_of(a, on.multiprocessors);
  const dim3 grid(l.grid[0], l.grid[1]);
  if (l.vectors) launch_vectors(l, on);
  else if (l.float64) ERSDE_LAUNCH(log_prob_elements<double>, grid, dim3(kThreads), on.stream, *l.elements, on.early);
  else ERSDE_LAUNCH(log_prob_elements<float>, grid, dim3(kThreads), on.stream, *l.elements, on.early);
  if (l.sums) ERSDE_LAUNCH(log_prob_sums, dim3((unsigned)a.step.sizes[0]), dim3(kSumLanes), on.stream, l.last, on.early);
  return launch_error();
}
#endif

}  // namespace ersde
