// What the kernels of er_sde_step.cu and er_sde_log_prob.cu share on a CUDA device: storage types, and one element of any step.
#pragma once
#include "er_sde_launch.h"
#include "er_sde_step.h"
#ifdef __CUDACC_RTC__  // kernels alone
namespace ersde {
namespace {
#include "er_sde_math.h"
#include "er_sde_rows.h"
#include "er_sde_vectors.h"
}  // namespace
}  // namespace ersde
#else
#include "er_sde_prepare.h"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace ersde {
namespace {

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ void store(float* p, float v) { *p = v; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }
__device__ __forceinline__ void store(__half* p, float v) { *p = __float2half_rn(v); }
// Torch rounds the noise itself to the tensor's type before anything is done with it.
__device__ __forceinline__ float rounded(float v, __nv_bfloat16) { return __bfloat162float(__float2bfloat16_rn(v)); }
__device__ __forceinline__ float rounded(float v, __half) { return __half2float(__float2half_rn(v)); }

// The keys of a seed, in registers for a whole loop: without the barrier the compiler adds them up anew for every group.
__device__ __forceinline__ Keys kept_keys(uint64_t seed) {
  Keys keys = keys_of(seed);
#ifdef __CUDA_ARCH__
#pragma unroll
  for (int round = 0; round < 10; ++round) asm volatile("" : "+r"(keys.first[round]), "+r"(keys.second[round]));
#endif
  return keys;
}

template <typename A>
__device__ __forceinline__ A load_any(const char* p, DType t) {
  switch (t) {
    case DType::float32: return (A)*reinterpret_cast<const float*>(p);
    case DType::float64: return (A)*reinterpret_cast<const double*>(p);
    case DType::bfloat16: return (A)load(reinterpret_cast<const __nv_bfloat16*>(p));
    case DType::float16: return (A)load(reinterpret_cast<const __half*>(p));
  }
  return A(0);
}

template <typename A>
__device__ __forceinline__ void store_any(char* p, DType t, A v) {
  switch (t) {
    case DType::float32: *reinterpret_cast<float*>(p) = (float)v; return;
    case DType::float64: *reinterpret_cast<double*>(p) = (double)v; return;
    case DType::bfloat16: store(reinterpret_cast<__nv_bfloat16*>(p), (float)v); return;
    case DType::float16: store(reinterpret_cast<__half*>(p), (float)v); return;
  }
}

// Torch's stream, where a captured graph reads it anew.
struct TorchState {
  uint64_t seed, offset;
};
__device__ __forceinline__ TorchState torch_state(const Drawn& d) {
  return {d.torch_seed_pointer ? (uint64_t)*d.torch_seed_pointer : d.seed,
          d.torch_offset + (d.torch_offset_pointer ? (uint64_t)*d.torch_offset_pointer : 0u)};
}

// Where element e, in row-major order, lies in each operand, in bytes; its position in its sample, and the sample.
struct Place {
  int64_t terms[kMaxTerms], out, denoised, guide, position, b;
};

template <typename I>
__device__ __forceinline__ Place place_of(const StepArgs& a, int slot, int64_t e) {
  Place at{};
  at.denoised = ring_offset(a.rows, slot, 0);
  at.position = a.first_position;
  I rest = (I)e;
#pragma unroll 1
  for (int d = a.ndim - 1; d >= 0; --d) {
    const I size = (I)a.sizes[d], index = d ? rest % size : rest;
    rest /= size;
    for (int k = 0; k < kMaxTerms; ++k) {
      if (k < a.num_terms) at.terms[k] += (int64_t)index * a.terms[k].strides[d];
    }
    at.out += (int64_t)index * a.out.strides[d];
    at.denoised += (int64_t)index * a.denoised.strides[d];
    at.guide += (int64_t)index * a.guide.strides[d];
    at.position += (int64_t)index * a.position_strides[d];
    at.b = (int64_t)index;
  }
  return at;
}

// The step of one element, accumulated in A.
template <typename A>
__device__ __forceinline__ void step_element(const StepArgs& a, const Coefficients<A>& c, const Place& at, int slot,
                                             const TorchState& torch, int64_t e) {
  const bool predicts = a.rows.predicts;
  A predicted = A(-0.0);
  if (predicts) {
    if (c.p[0] != 0) predicted = fma_(c.p[0], load_any<A>(a.terms[0].data + at.terms[0], a.terms[0].dtype), predicted);
    if (c.p[1] != 0) predicted = fma_(c.p[1], load_any<A>(a.terms[1].data + at.terms[1], a.terms[1].dtype), predicted);
    if (c.p[2] != 0) predicted = fma_(c.p[2], load_any<A>(a.guide.data + at.guide, a.guide.dtype), predicted);
    store_any<A>(a.denoised.data + at.denoised, a.denoised.dtype, predicted);
    predicted = load_any<A>(a.denoised.data + at.denoised, a.denoised.dtype);
  }
  A y = A(-0.0);
#pragma unroll
  for (int k = 0; k < kMaxTerms; ++k) {
    if (k >= a.num_terms || c.w[k] == 0) continue;
    const char* p = a.terms[k].data + at.terms[k] + term_offset(a.rows, slot, k);
    const A term = predicts && k == 1 ? predicted : load_any<A>(p, a.terms[k].dtype);
    y = fma_(c.w[k], term, y);
  }
  if (a.drawn.source != Noise::none && c.noise != 0) {
    A z;
    if (a.drawn.source == Noise::portable) {
      const uint64_t seed = a.drawn.seeds ? (uint64_t)a.drawn.seeds[2 * at.b] : a.drawn.seed;
      const uint64_t sample = a.drawn.seeds ? (uint64_t)a.drawn.seeds[2 * at.b + 1] : (uint64_t)at.b;
      float z0, z1, z2, z3;
      portable_normals(keys_of(seed), portable_counter((uint64_t)at.position / 4, c.counter, sample), z0, z1, z2, z3);
      const int lane = (int)(at.position % 4);
      z = (A)(lane == 0 ? z0 : lane == 1 ? z1 : lane == 2 ? z2 : z3);
    } else if (a.out.dtype == DType::float64) {
      z = (A)torch_normal_double(torch.seed, torch.offset, (uint64_t)a.drawn.torch_threads, (uint64_t)e);
    } else {
      const float drawn = torch_normal(torch.seed, torch.offset, (uint64_t)a.drawn.torch_threads, (uint64_t)e);
      z = (A)(a.out.dtype == DType::bfloat16  ? rounded(drawn, __nv_bfloat16())
              : a.out.dtype == DType::float16 ? rounded(drawn, __half())
                                              : drawn);
    }
    y = fma_(c.noise, z, y);
  }
  store_any<A>(a.out.data + at.out, a.out.dtype, y);
}

#ifndef __CUDACC_RTC__
// Calls f with a value of the type that holds 2- or 4-byte numbers; float64 has no vectors.
template <typename F>
bool with_vector_type(DType t, const F& f) {
  switch (t) {
    case DType::float32: f(float()); return true;
    case DType::bfloat16: f(__nv_bfloat16()); return true;
    case DType::float16: f(__half()); return true;
    case DType::float64: return false;
  }
  return false;
}
#endif

}  // namespace
}  // namespace ersde
