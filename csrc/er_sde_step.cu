// The fused step on CUDA: x_next = sum_k w[k] term[k] + w_noise z, one pass over memory, the noise drawn in registers.
//
// Two kernels over the functions of er_sde_math.h:
//   step_vectors   aligned, contiguous tensors of one 2- or 4-byte type: 128-bit loads and stores, grid-stride,
//                  specialised by the number of terms and the source of noise;
//   step_elements  everything else: dtypes, strides and shards known at run time, one element at a time.
// No shared memory, no atomics, no torch header; a machine without a GPU compiles this file as C++ and runs it in tests.
#include "er_sde_step.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#ifndef ERSDE_LAUNCH
#include <cuda_runtime.h>
#define ERSDE_LAUNCH(kernel, grid, block, stream, args) kernel<<<grid, block, 0, (cudaStream_t)(stream)>>>(args)
#endif

namespace ersde {
namespace {

#include "er_sde_math.h"

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 16;  // an H200 is fastest with 16 to 32; with torch's stream, 32

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

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ void store(float* p, float v) { *p = v; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }
__device__ __forceinline__ void store(__half* p, float v) { *p = __float2half_rn(v); }
// Torch rounds the noise itself to the tensor's type before anything is done with it.
__device__ __forceinline__ float rounded(float v, __nv_bfloat16) { return __bfloat162float(__float2bfloat16_rn(v)); }
__device__ __forceinline__ float rounded(float v, __half) { return __half2float(__float2half_rn(v)); }

// What step_vectors needs of StepArgs.
struct VectorArgs {
  const void* terms[kMaxTerms];
  void* out;
  int64_t size;  // of one sample; of the whole tensor without portable noise
  float weights[kMaxTerms];
  float w_noise;
  const double* table;
  const int64_t* row;
  int num_columns;
  int columns[kMaxTerms];
  const int64_t* seeds;
  uint64_t seed;
  uint32_t step;
  int64_t torch_threads;
  uint64_t torch_offset;
  const int64_t *torch_seed_pointer, *torch_offset_pointer;
};

template <int K>
struct Weights {
  float w[K], noise;
};

template <int K>
__device__ __forceinline__ Weights<K> weights_of(const VectorArgs& a) {
  Weights<K> weights;
  const double* row = a.table ? a.table + *a.row * a.num_columns : nullptr;
#pragma unroll
  for (int k = 0; k < K; ++k) weights.w[k] = row ? (float)row[a.columns[k]] : a.weights[k];
  weights.noise = row ? (float)row[a.num_columns - 1] : a.w_noise;
  return weights;
}

template <int K>
struct Loaded {
  uint4 v[K];
};

// The terms of vector `at`, in vectors from the start of the tensors. Called before the noise is drawn, so that the loads and
// the arithmetic overlap.
template <int K>
__device__ __forceinline__ Loaded<K> load_vector(const VectorArgs& a, const Weights<K>& weights, int64_t at) {
  Loaded<K> loaded;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    loaded.v[k] = weights.w[k] != 0 ? static_cast<const uint4*>(a.terms[k])[at] : uint4{0, 0, 0, 0};
  }
  return loaded;
}

template <typename T, int K, bool Draws>
__device__ __forceinline__ void step_vector(const VectorArgs& a, const Weights<K>& weights, const Loaded<K>& loaded, int64_t at,
                                            const float (&z)[Pack<T>::size]) {
  constexpr int N = Pack<T>::size;
  float y[N];
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = -0.0f;  // the one number whose sum with a product is the product, its sign included
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float f[N];
    unpack_as<T>(loaded.v[k], f);
    if (weights.w[k] != 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = fma_(weights.w[k], f[i], y[i]);
    }
  }
  if (Draws && weights.noise != 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = fma_(weights.noise, z[i], y[i]);
  }
  static_cast<uint4*>(a.out)[at] = pack(y, T());
}

template <typename T, int K>
__device__ __forceinline__ void step_scalar(const VectorArgs& a, const Weights<K>& weights, int64_t e, bool draws, float z) {
  float y = -0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (weights.w[k] != 0) y = fma_(weights.w[k], load(static_cast<const T*>(a.terms[k]) + e), y);
  }
  if (draws && weights.noise != 0) y = fma_(weights.noise, z, y);
  store(static_cast<T*>(a.out) + e, y);
}

// Without noise, or with the portable stream, whose sample is blockIdx.y: a thread owns 16 bytes, whole groups of four.
template <typename T, int K, Noise Source>
__global__ void __launch_bounds__(kThreads) step_vectors(const __grid_constant__ VectorArgs a) {
  constexpr int N = Pack<T>::size;
  constexpr bool draws = Source == Noise::portable;
  const Weights<K> weights = weights_of<K>(a);
  const uint64_t b = blockIdx.y;
  const uint64_t seed = draws && a.seeds ? (uint64_t)a.seeds[2 * b] : a.seed;
  const uint64_t sample = draws && a.seeds ? (uint64_t)a.seeds[2 * b + 1] : b;
  const uint32_t step = a.step + (a.table ? (uint32_t)*a.row : 0u);
  const int64_t vectors = a.size / N, thread = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  for (int64_t v = thread; v < vectors; v += (int64_t)gridDim.x * kThreads) {
    const int64_t at = (int64_t)b * vectors + v;
    const Loaded<K> loaded = load_vector<K>(a, weights, at);
    float z[N] = {};
    if constexpr (draws) {
#pragma unroll
      for (int g = 0; g < N / 4; ++g) {
        portable_normals(seed, portable_counter((uint64_t)v * (N / 4) + g, step, sample), z[4 * g], z[4 * g + 1], z[4 * g + 2],
                         z[4 * g + 3]);
      }
    }
    step_vector<T, K, draws>(a, weights, loaded, at, z);
  }
  // Fewer than N elements are left over, only where there is one sample.
  const int64_t e = vectors * N + thread;
  if (thread < N && e < a.size) {
    float z[4] = {};
    if constexpr (draws) portable_normals(seed, portable_counter((uint64_t)e / 4, step, sample), z[0], z[1], z[2], z[3]);
    step_scalar<T, K>(a, weights, e, draws, e % 4 == 0 ? z[0] : e % 4 == 1 ? z[1] : e % 4 == 2 ? z[2] : z[3]);
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
constexpr int torch_blocks(int terms) { return terms == 6 ? 1 : 2; }

// With torch's stream: a thread draws for N neighbouring subsequences, each of which serves four places, torch_threads
// elements apart, so that it owns 16 bytes in each of four segments. blockIdx.y strides over the blocks of the stream.
template <typename T, int K>
__global__ void __launch_bounds__(kThreads, torch_blocks(K)) step_vectors_torch(const __grid_constant__ VectorArgs a) {
  constexpr int N = Pack<T>::size;
  const Weights<K> weights = weights_of<K>(a);
  const uint64_t seed = a.torch_seed_pointer ? (uint64_t)*a.torch_seed_pointer : a.seed;
  const uint64_t offset = a.torch_offset + (a.torch_offset_pointer ? (uint64_t)*a.torch_offset_pointer : 0u);
  const int64_t first = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * N, stride = 4 * a.torch_threads;
  if (first >= a.torch_threads) return;

  uint32_t drawn[4][4];
  const auto draw = [&](int64_t block) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      float z[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Words w = torch_words(seed, offset, (uint64_t)block, (uint64_t)(first + i + j));
        torch_pair(w.x, w.y, z[j][0], z[j][1]);
        torch_pair(w.z, w.w, z[j][2], z[j][3]);
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
    const int64_t at = (block * stride + first) / N, segment = a.torch_threads / N;
    Loaded<K> loaded = load_vector<K>(a, weights, at);
    draw(block);
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      const Loaded<K> now = loaded;
      if (place < 3) loaded = load_vector<K>(a, weights, at + (place + 1) * segment);
      float z[N];
      noise_of(place, z);
      step_vector<T, K, true>(a, weights, now, at + place * segment, z);
    }
  }
  if (block == whole && whole * stride < a.size) {  // the last block of the stream serves fewer elements
    draw(block);
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      const int64_t e = block * stride + place * a.torch_threads + first;
      float z[N];
      noise_of(place, z);
      if (e + N <= a.size) {
        step_vector<T, K, true>(a, weights, load_vector<K>(a, weights, e / N), e / N, z);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (e + i < a.size) step_scalar<T, K>(a, weights, e + i, true, z[i]);
        }
      }
    }
  }
}

template <typename A>
__device__ __forceinline__ A load_any(const char* p, DType t) {
  switch (t) {
    case DType::float32: return (A)*reinterpret_cast<const float*>(p);
    case DType::float64: return (A)*reinterpret_cast<const double*>(p);
    case DType::bfloat16: return (A)load(reinterpret_cast<const __nv_bfloat16*>(p));
    default: return (A)load(reinterpret_cast<const __half*>(p));
  }
}

template <typename A>
__device__ __forceinline__ void store_any(char* p, DType t, A v) {
  switch (t) {
    case DType::float32: *reinterpret_cast<float*>(p) = (float)v; return;
    case DType::float64: *reinterpret_cast<double*>(p) = (double)v; return;
    case DType::bfloat16: store(reinterpret_cast<__nv_bfloat16*>(p), (float)v); return;
    default: store(reinterpret_cast<__half*>(p), (float)v); return;
  }
}

// Any dtypes, strides and shards: accumulates in A, indices in I (32 bits where the number of elements allows).
template <typename A, typename I>
__global__ void __launch_bounds__(kThreads) step_elements(const __grid_constant__ StepArgs a) {
  const double* row = a.table ? a.table + *a.row * a.num_columns : nullptr;
  const A w_noise = a.noise == Noise::none ? A(0) : (A)(row ? row[a.num_columns - 1] : a.w_noise);
  const uint64_t torch_seed = a.torch_seed_pointer ? (uint64_t)*a.torch_seed_pointer : a.seed;
  const uint64_t torch_offset = a.torch_offset + (a.torch_offset_pointer ? (uint64_t)*a.torch_offset_pointer : 0u);
  const uint32_t step = a.step + (row ? (uint32_t)*a.row : 0u);
  const int64_t threads = (int64_t)gridDim.x * kThreads;
  for (int64_t e = (int64_t)blockIdx.x * kThreads + threadIdx.x; e < a.numel; e += threads) {
    int64_t offset[kMaxTerms] = {}, out_offset = 0, position = a.first_position, b = 0;
    I rest = (I)e;
#pragma unroll 1
    for (int d = a.ndim - 1; d >= 0; --d) {
      const I size = (I)a.sizes[d], index = d ? rest % size : rest;
      rest /= size;
      for (int k = 0; k < kMaxTerms; ++k) {
        if (k < a.num_terms) offset[k] += (int64_t)index * a.terms[k].strides[d];
      }
      out_offset += (int64_t)index * a.out.strides[d];
      position += (int64_t)index * a.position_strides[d];
      b = (int64_t)index;
    }
    A y = A(-0.0);
#pragma unroll
    for (int k = 0; k < kMaxTerms; ++k) {
      if (k < a.num_terms) {
        const A w = (A)(row ? row[a.columns[k]] : a.weights[k]);
        if (w != 0) y = fma_(w, load_any<A>(a.terms[k].data + offset[k], a.terms[k].dtype), y);
      }
    }
    if (w_noise != 0) {
      A z;
      if (a.noise == Noise::portable) {
        const uint64_t seed = a.seeds ? (uint64_t)a.seeds[2 * b] : a.seed;
        const uint64_t sample = a.seeds ? (uint64_t)a.seeds[2 * b + 1] : (uint64_t)b;
        float z0, z1, z2, z3;
        portable_normals(seed, portable_counter((uint64_t)position / 4, step, sample), z0, z1, z2, z3);
        const int lane = (int)(position % 4);
        z = (A)(lane == 0 ? z0 : lane == 1 ? z1 : lane == 2 ? z2 : z3);
      } else if (a.out.dtype == DType::float64) {
        z = (A)torch_normal_double(torch_seed, torch_offset, (uint64_t)a.torch_threads, (uint64_t)e);
      } else {
        const float drawn = torch_normal(torch_seed, torch_offset, (uint64_t)a.torch_threads, (uint64_t)e);
        z = (A)(a.out.dtype == DType::bfloat16  ? rounded(drawn, __nv_bfloat16())
                : a.out.dtype == DType::float16 ? rounded(drawn, __half())
                                                : drawn);
      }
      y = fma_(w_noise, z, y);
    }
    store_any<A>(a.out.data + out_offset, a.out.dtype, y);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether step_vectors can run this: one 2- or 4-byte type, contiguous and aligned; with portable noise whole samples.
bool fits_vectors(const StepArgs& a) {
  const DType t = a.out.dtype;
  const int64_t item = size_of(t), vector = 16 / item, last = a.ndim - 1;
  if (t == DType::float64 || a.float64 || a.num_terms == 0) return false;
  if (a.noise == Noise::portable) {
    const bool one = a.sizes[0] == 1;
    if (a.ndim != 2 || a.first_position != 0 || (!one && (a.sizes[1] % vector != 0 || a.sizes[0] > 65535))) return false;
  } else if (a.ndim != 1) {
    return false;
  }
  const auto fits = [&](const Operand& o) {
    return o.dtype == t && (uintptr_t)o.data % 16 == 0 && (o.strides[last] == item || a.sizes[last] == 1) &&
           (a.ndim == 1 || a.sizes[0] == 1 || o.strides[0] == item * a.sizes[1]);
  };
  for (int k = 0; k < a.num_terms; ++k) {
    if (!fits(a.terms[k])) return false;
  }
  return fits(a.out);
}

template <typename T, int K>
void launch_vectors(const StepArgs& a, const VectorArgs& v, int multiprocessors, void* stream) {
  constexpr int N = Pack<T>::size;
  const int64_t samples = a.noise == Noise::portable ? a.sizes[0] : 1, most = (int64_t)multiprocessors * kBlocksPerMultiprocessor;
  const int64_t wanted = ceil_div(ceil_div(v.size, N), kThreads), each = ceil_div(most, samples);
  const dim3 grid((unsigned)(wanted < each ? wanted : each), (unsigned)samples);
  if (a.noise == Noise::none) {
    ERSDE_LAUNCH((step_vectors<T, K, Noise::none>), grid, dim3(kThreads), stream, v);
  } else if constexpr (K < kMaxTerms) {
    if (a.noise == Noise::portable) {
      ERSDE_LAUNCH((step_vectors<T, K, Noise::portable>), grid, dim3(kThreads), stream, v);
    } else {
      const int64_t across = ceil_div(a.torch_threads / N, kThreads), blocks = ceil_div(v.size, 4 * a.torch_threads);
      const int64_t down = ceil_div(2 * most, across);
      const dim3 torch_grid((unsigned)across, (unsigned)(blocks < down ? blocks : down));
      ERSDE_LAUNCH((step_vectors_torch<T, K>), torch_grid, dim3(kThreads), stream, v);
    }
  }
}

template <typename T>
void launch_terms(const StepArgs& a, const VectorArgs& v, int multiprocessors, void* stream) {
  switch (a.num_terms) {
    case 1: return launch_vectors<T, 1>(a, v, multiprocessors, stream);
    case 2: return launch_vectors<T, 2>(a, v, multiprocessors, stream);
    case 3: return launch_vectors<T, 3>(a, v, multiprocessors, stream);
    case 4: return launch_vectors<T, 4>(a, v, multiprocessors, stream);
    case 5: return launch_vectors<T, 5>(a, v, multiprocessors, stream);
    case 6: return launch_vectors<T, 6>(a, v, multiprocessors, stream);
    default: return launch_vectors<T, 7>(a, v, multiprocessors, stream);
  }
}

}  // namespace

const char* step_cuda(const StepArgs& a, int multiprocessors, void* stream) {
  if (fits_vectors(a)) {
    VectorArgs v{};
    for (int k = 0; k < a.num_terms; ++k) {
      v.terms[k] = a.terms[k].data;
      v.weights[k] = (float)a.weights[k];
      v.columns[k] = a.columns[k];
    }
    v.out = a.out.data;
    v.size = a.noise == Noise::portable ? a.sizes[1] : a.numel;
    v.w_noise = (float)a.w_noise;
    v.table = a.table;
    v.row = a.row;
    v.num_columns = a.num_columns;
    v.seeds = a.seeds;
    v.seed = a.seed;
    v.step = a.step;
    v.torch_threads = a.torch_threads;
    v.torch_offset = a.torch_offset;
    v.torch_seed_pointer = a.torch_seed_pointer;
    v.torch_offset_pointer = a.torch_offset_pointer;
    if (a.out.dtype == DType::float32) launch_terms<float>(a, v, multiprocessors, stream);
    else if (a.out.dtype == DType::bfloat16) launch_terms<__nv_bfloat16>(a, v, multiprocessors, stream);
    else launch_terms<__half>(a, v, multiprocessors, stream);
  } else {
    const int64_t wanted = ceil_div(a.numel, kThreads), most = (int64_t)multiprocessors * kBlocksPerMultiprocessor;
    const dim3 grid((unsigned)(wanted < most ? wanted : most));
    const bool small = a.numel < (int64_t{1} << 32);
    if (a.float64 && small) ERSDE_LAUNCH((step_elements<double, uint32_t>), grid, dim3(kThreads), stream, a);
    else if (a.float64) ERSDE_LAUNCH((step_elements<double, uint64_t>), grid, dim3(kThreads), stream, a);
    else if (small) ERSDE_LAUNCH((step_elements<float, uint32_t>), grid, dim3(kThreads), stream, a);
    else ERSDE_LAUNCH((step_elements<float, uint64_t>), grid, dim3(kThreads), stream, a);
  }
#ifdef __CUDACC__
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  return nullptr;
#endif
}

}  // namespace ersde
