// The fused step on CUDA: x_next = sum_k w[k] term[k] + w_noise z, one pass over memory, the noise drawn in registers.
//
// Two kernels over the functions of er_sde_math.h:
//   step_vectors   aligned, contiguous tensors of one 2- or 4-byte type: 128-bit loads and stores, grid-stride,
//                  specialised by the number of terms and the source of noise;
//   step_elements  everything else: dtypes, strides and shards known at run time, one element at a time.
// No shared memory, no atomics, no torch header; a machine without a GPU compiles this file as C++ and runs it in tests.
#include "er_sde_elements.h"

namespace ersde {
namespace {

template <typename T>
struct Pack {  // 16 bytes of T
  static constexpr int size = 16 / sizeof(T);
};

__device__ __forceinline__ void unpack(uint4 v, float (&f)[4]) {
  f[0] = as_float(v.x);
  f[1] = as_float(v.y);
  f[2] = as_float(v.z);
  f[3] = as_float(v.w);
}
__device__ __forceinline__ uint4 pack(const float (&f)[4], float) {
  return make_uint4(as_bits(f[0]), as_bits(f[1]), as_bits(f[2]), as_bits(f[3]));
}
__device__ __forceinline__ void unpack_bfloat16(uint4 v, float (&f)[8]) {
  const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = as_float(w[i] << 16);
    f[2 * i + 1] = as_float(w[i] & 0xFFFF0000u);
  }
}
__device__ __forceinline__ void unpack_float16(uint4 v, float (&f)[8]) {
  const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __half2 h;
    memcpy(&h, &w[i], 4);
    const float2 two = __half22float2(h);
    f[2 * i] = two.x;
    f[2 * i + 1] = two.y;
  }
}
template <typename T2>
__device__ __forceinline__ uint32_t bits_of(T2 two) {
  uint32_t w;
  memcpy(&w, &two, 4);
  return w;
}
__device__ __forceinline__ uint4 pack(const float (&f)[8], __nv_bfloat16) {
  return make_uint4(bits_of(__floats2bfloat162_rn(f[0], f[1])), bits_of(__floats2bfloat162_rn(f[2], f[3])),
                    bits_of(__floats2bfloat162_rn(f[4], f[5])), bits_of(__floats2bfloat162_rn(f[6], f[7])));
}
__device__ __forceinline__ uint4 pack(const float (&f)[8], __half) {
  return make_uint4(bits_of(__floats2half2_rn(f[0], f[1])), bits_of(__floats2half2_rn(f[2], f[3])),
                    bits_of(__floats2half2_rn(f[4], f[5])), bits_of(__floats2half2_rn(f[6], f[7])));
}
template <typename T, int N>
__device__ __forceinline__ void unpack_as(uint4 v, float (&f)[N]) {
  if constexpr (sizeof(T) == 4) unpack(v, f);
  else if constexpr (std::is_same_v<T, __half>) unpack_float16(v, f);
  else unpack_bfloat16(v, f);
}

template <int K>
__device__ __forceinline__ Coefficients<float> coefficients(const VectorArgs& a, int64_t b) {
  return known_to_host(a.rows) ? a.coefficients : coefficients_of<float, K>(a.rows, b);
}

// The terms of one vector, and the guide behind them.
template <int K, bool Predicts>
struct Loaded {
  uint4 v[K + Predicts];
};

// Loads vector `at`, in vectors from the start of the tensors. Called before the noise is drawn, so that the loads and the
// arithmetic overlap.
template <int K, bool Predicts>
__device__ __forceinline__ Loaded<K, Predicts> load_vector(const VectorArgs& a, const Coefficients<float>& c, int slot, int64_t at) {
  Loaded<K, Predicts> loaded;
#pragma unroll
  for (int k = 0; k < K + Predicts; ++k) {
    bool read = k < K && c.w[k] != 0;
    if (Predicts && k == 0) read |= c.p[0] != 0;
    if (Predicts && k == 1) read = c.p[1] != 0;
    if (Predicts && k == K) read = c.p[2] != 0;
    const char* p = static_cast<const char*>(k < K ? a.terms[k] : a.guide);
    if (Predicts && k < K && a.rows.ring) p += term_offset(a.rows, slot, k);  // a branch: without it registers spill on sm_80
    loaded.v[k] = read ? reinterpret_cast<const uint4*>(p)[at] : uint4{0, 0, 0, 0};
  }
  return loaded;
}

template <typename T>
__device__ __forceinline__ void add_vector(float (&y)[Pack<T>::size], float w, uint4 term) {
  float f[Pack<T>::size];
  unpack_as<T>(term, f);
  if (w != 0) {
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) y[i] = fma_(w, f[i], y[i]);
  }
}

template <int N>
__device__ __forceinline__ void clear(float (&y)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = -0.0f;  // the one number whose sum with a product is the product, its sign included
}

template <typename T, int K, bool Draws, bool Predicts>
__device__ __forceinline__ void step_vector(const VectorArgs& a, const Coefficients<float>& c, Loaded<K, Predicts> loaded, int slot,
                                            int64_t at, const float (&z)[Pack<T>::size]) {
  constexpr int N = Pack<T>::size;
  float y[N];
  if constexpr (Predicts) {
    clear(y);
    add_vector<T>(y, c.p[0], loaded.v[0]);
    add_vector<T>(y, c.p[1], loaded.v[1]);
    add_vector<T>(y, c.p[2], loaded.v[K]);
    loaded.v[1] = pack(y, T());  // rounded, as later steps will read it
    reinterpret_cast<uint4*>(static_cast<char*>(a.denoised) + ring_offset(a.rows, slot, 0))[at] = loaded.v[1];
  }
  clear(y);
#pragma unroll
  for (int k = 0; k < K; ++k) add_vector<T>(y, c.w[k], loaded.v[k]);
  if (Draws && c.noise != 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = fma_(c.noise, z[i], y[i]);
  }
  static_cast<uint4*>(a.out)[at] = pack(y, T());
}

template <typename T, int K, bool Predicts>
__device__ __forceinline__ void step_scalar(const VectorArgs& a, const Coefficients<float>& c, int slot, int64_t e, bool draws,
                                            float z) {
  float predicted = -0.0f, y = -0.0f;
  const auto term = [&](const void* data, int64_t bytes) {
    return load(reinterpret_cast<const T*>(static_cast<const char*>(data) + bytes) + e);
  };
  if constexpr (Predicts) {
    if (c.p[0] != 0) predicted = fma_(c.p[0], term(a.terms[0], 0), predicted);
    if (c.p[1] != 0) predicted = fma_(c.p[1], term(a.terms[1], 0), predicted);
    if (c.p[2] != 0) predicted = fma_(c.p[2], term(a.guide, 0), predicted);
    T* denoised = reinterpret_cast<T*>(static_cast<char*>(a.denoised) + ring_offset(a.rows, slot, 0)) + e;
    store(denoised, predicted);
    predicted = load(denoised);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (c.w[k] == 0) continue;
    y = fma_(c.w[k], Predicts && k == 1 ? predicted : term(a.terms[k], Predicts ? term_offset(a.rows, slot, k) : 0), y);
  }
  if (draws && c.noise != 0) y = fma_(c.noise, z, y);
  store(static_cast<T*>(a.out) + e, y);
}

// Without noise, or with the portable stream: a thread owns 16 bytes, whole groups of four. blockIdx.y is the row, where
// samples differ.
template <typename T, int K, Noise Source, bool Predicts>
__global__ void __launch_bounds__(kThreads) step_vectors(const __grid_constant__ VectorArgs a) {
  constexpr int N = Pack<T>::size;
  constexpr bool draws = Source == Noise::portable;
  const unsigned row = blockIdx.y;
  const uint64_t b = row / a.rows_of_sample;
  const uint64_t first_group = (uint64_t)(a.first_group + (int64_t)(row % a.rows_of_sample) * a.groups_between_rows);
  let_the_kernel_behind_start();
  // Where nothing that the noise depends on lies in memory, that of the first vector is drawn while the kernel before this ends;
  // but eight numbers take longer than what there is to wait for.
  const bool ahead = draws && N == 4 && known_to_host(a.rows) && !a.drawn.seeds;
  if (!ahead) wait_for_the_kernel_before();
  const Coefficients<float> c = coefficients<K>(a, (int64_t)b);
  const int slot = Predicts ? ring_slot(a.rows) : 0;
  const uint64_t seed = draws && a.drawn.seeds ? (uint64_t)a.drawn.seeds[2 * b] : a.drawn.seed;
  const uint64_t sample = draws && a.drawn.seeds ? (uint64_t)a.drawn.seeds[2 * b + 1] : b;
  const Keys keys = draws ? kept_keys(seed) : Keys{};
  const int64_t vectors = a.size / N, thread = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  float z[N] = {};
  const auto draw = [&](int64_t v) {
    if constexpr (draws) {
#pragma unroll
      for (int g = 0; g < N / 4; ++g) {
        portable_normals(keys, portable_counter(first_group + (uint64_t)v * (N / 4) + g, c.counter, sample), z[4 * g], z[4 * g + 1],
                         z[4 * g + 2], z[4 * g + 3]);
      }
    }
  };
  if (ahead) {
    draw(thread);
    wait_for_the_kernel_before();
  }
  for (int64_t v = thread; v < vectors; v += (int64_t)gridDim.x * kThreads) {
    const int64_t at = (int64_t)row * vectors + v;
    const auto loaded = load_vector<K, Predicts>(a, c, slot, at);
    if (!ahead || v != thread) draw(v);
    step_vector<T, K, draws, Predicts>(a, c, loaded, slot, at, z);
  }
  // Fewer than N elements are left over, only where there is one sample.
  const int64_t e = vectors * N + thread;
  if (thread < N && e < a.size) {
    if constexpr (draws) portable_normals(keys, portable_counter(first_group + (uint64_t)e / 4, c.counter, sample), z[0], z[1], z[2], z[3]);
    step_scalar<T, K, Predicts>(a, c, slot, e, draws, e % 4 == 0 ? z[0] : e % 4 == 1 ? z[1] : e % 4 == 2 ? z[2] : z[3]);
  }
}

// Numbers i and i + 1 of the 16 bytes `words`, in the storage type: torch rounds its noise to that before anything else.
template <typename T>
__device__ __forceinline__ void put_pair(uint32_t (&words)[4], int i, float first, float second) {
  if constexpr (sizeof(T) == 4) {
    words[i] = as_bits(first);
    words[i + 1] = as_bits(second);
  } else if constexpr (std::is_same_v<T, __half>) {
    words[i / 2] = bits_of(__floats2half2_rn(first, second));
  } else {
    words[i / 2] = bits_of(__floats2bfloat162_rn(first, second));
  }
}

// Thread blocks that step_vectors_torch keeps on a multiprocessor: as many as take no spills, to hide the loads.
constexpr int torch_blocks(int terms, bool predicts) {
  if (!predicts && terms <= 4) return 3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return terms == 6 || (predicts && terms >= 3) ? 1 : 2;
#else
  return terms == 6 || (predicts && terms == 5) ? 1 : 2;
#endif
}

// With torch's stream: a thread draws for N neighbouring subsequences, each of which serves four places, torch_threads
// elements apart, so that it owns 16 bytes in each of four segments. blockIdx.y strides over the blocks of the stream.
template <typename T, int K, bool Predicts>
__global__ void __launch_bounds__(kThreads, torch_blocks(K, Predicts)) step_vectors_torch(const __grid_constant__ VectorArgs a) {
  constexpr int N = Pack<T>::size;
  let_the_kernel_behind_start();
  wait_for_the_kernel_before();
  const Coefficients<float> c = coefficients<K>(a, 0);
  const int slot = Predicts ? ring_slot(a.rows) : 0;
  const uint64_t seed = a.drawn.torch_seed_pointer ? (uint64_t)*a.drawn.torch_seed_pointer : a.drawn.seed;
  const uint64_t offset = a.drawn.torch_offset + (a.drawn.torch_offset_pointer ? (uint64_t)*a.drawn.torch_offset_pointer : 0u);
  const int64_t threads = a.drawn.torch_threads, stride = 4 * threads;
  const int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * N;
  if (first >= threads) return;
  const Keys keys = kept_keys(seed);

  uint32_t drawn[4][4];
  const auto draw = [&](int64_t block, bool all_places) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      float z[2][4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Words w = torch_words(keys, offset, (uint64_t)block, (uint64_t)(first + i + j));
        torch_pair(w.x, w.y, z[j][0], z[j][1]);
        if (all_places) torch_pair(w.z, w.w, z[j][2], z[j][3]);
      }
#pragma unroll
      for (int place = 0; place < 4; ++place) put_pair<T>(drawn[place], i, z[0][place], z[1][place]);
    }
  };
  const auto noise_of = [&](int place, float (&z)[N]) {
    unpack_as<T>(make_uint4(drawn[place][0], drawn[place][1], drawn[place][2], drawn[place][3]), z);
  };
  const int64_t whole = a.size / stride;
  int64_t block = blockIdx.y;
  for (; block < whole; block += gridDim.y) {
    const int64_t at = (block * stride + first) / N, segment = threads / N;
    auto loaded = load_vector<K, Predicts>(a, c, slot, at);
    draw(block, true);
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      // Where a prediction takes registers of its own, only the first place is loaded ahead.
      const auto now = Predicts && place > 0 ? load_vector<K, Predicts>(a, c, slot, at + place * segment) : loaded;
      if (!Predicts && place < 3) loaded = load_vector<K, Predicts>(a, c, slot, at + (place + 1) * segment);
      float z[N];
      noise_of(place, z);
      step_vector<T, K, true, Predicts>(a, c, now, slot, at + place * segment, z);
    }
  }
  if (block == whole && whole * stride < a.size) {  // the last block of the stream serves fewer elements
    draw(block, a.size - block * stride > 2 * threads);
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      const int64_t e = block * stride + place * threads + first;
      float z[N];
      noise_of(place, z);
      if (e + N <= a.size) {
        step_vector<T, K, true, Predicts>(a, c, load_vector<K, Predicts>(a, c, slot, e / N), slot, e / N, z);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (e + i < a.size) step_scalar<T, K, Predicts>(a, c, slot, e + i, true, z[i]);
        }
      }
    }
  }
}

// Any dtypes, strides and shards: accumulates in A, indices in I (32 bits where the number of elements allows).
template <typename A, typename I>
__global__ void __launch_bounds__(kThreads) step_elements(const __grid_constant__ StepArgs a) {
  let_the_kernel_behind_start();
  wait_for_the_kernel_before();
  Coefficients<A> c = coefficients_of<A, kMaxTerms>(a.rows, 0);
  const bool varies = a.rows.index_stride != 0 || a.rows.scales;
  const int slot = ring_slot(a.rows);
  const TorchState torch = torch_state(a.drawn);
  const int64_t threads = (int64_t)gridDim.x * kThreads;
  for (int64_t e = (int64_t)blockIdx.x * kThreads + threadIdx.x; e < a.numel; e += threads) {
    const Place at = place_of<I>(a, slot, e);
    if (varies) c = coefficients_of<A, kMaxTerms>(a.rows, at.b);
    step_element(a, c, at, slot, torch, e);
  }
}

}  // namespace

#ifndef __CUDACC_RTC__  // the launches
namespace {

template <typename T, int K, bool Predicts>
bool launch_vectors(const StepLaunch& l, const Launch& on) {
  const dim3 grid(l.grid[0], l.grid[1]);
  if (l.source == Noise::none) {
    ERSDE_LAUNCH((step_vectors<T, K, Noise::none, Predicts>), grid, dim3(kThreads), on.stream, l.vector, on.early);
    return true;
  }
  if constexpr (K < kMaxVectorTerms) {  // of which one is the noise that is not drawn
    if (l.source == Noise::portable) {
      ERSDE_LAUNCH((step_vectors<T, K, Noise::portable, Predicts>), grid, dim3(kThreads), on.stream, l.vector, on.early);
    } else {
      ERSDE_LAUNCH((step_vectors_torch<T, K, Predicts>), grid, dim3(kThreads), on.stream, l.vector, on.early);
    }
    return true;
  }
  return false;
}

// Whether there is such a kernel.
bool launch_vectors(const StepLaunch& l, const Launch& on) {
  bool there = false;
  with_vector_type(l.dtype, [&](auto number) {
    with_constant<1, kMaxVectorTerms>(l.terms, [&](auto k) {
      using T = decltype(number);
      constexpr int K = decltype(k)::value;
      if (!l.predicts) there = launch_vectors<T, K, false>(l, on);
      if constexpr (K >= 2) {
        if (l.predicts) there = launch_vectors<T, K, true>(l, on);
      }
    });
  });
  return there;
}

template <typename A>
void launch_elements(const StepLaunch& l, const Launch& on) {
  const dim3 grid(l.grid[0]);
  if (l.large) ERSDE_LAUNCH((step_elements<A, uint64_t>), grid, dim3(kThreads), on.stream, *l.elements, on.early);
  else ERSDE_LAUNCH((step_elements<A, uint32_t>), grid, dim3(kThreads), on.stream, *l.elements, on.early);
}

}  // namespace

const char* step_cuda(const StepArgs& a, const Launch& on) {
  const StepLaunch l = launch_of(a, on.multiprocessors);
  if (!l.vectors) l.float64 ? launch_elements<double>(l, on) : launch_elements<float>(l, on);
  else if (!launch_vectors(l, on)) return "there is no kernel for so many terms";
  return launch_error();
}
#endif

}  // namespace ersde
