// What the kernels use of C++'s library: where NVRTC compiles them there is none, and these few names stand for it. And how a function is
// marked that runs on the host and on a CUDA device.
#pragma once
#ifdef __CUDACC__
#define ERSDE_FN __host__ __device__ __forceinline__
#else
#define ERSDE_FN inline
#endif

#ifdef __CUDACC_RTC__
typedef signed int int32_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#ifndef NAN
#define NAN __int_as_float(0x7FFFFFFF)
#define INFINITY __int_as_float(0x7F800000)
#endif
namespace std {
using ::isfinite;
using ::isinf;
template <typename A, typename B>
constexpr bool is_same_v = false;
template <typename A>
constexpr bool is_same_v<A, A> = true;
template <typename T, T v>
struct integral_constant {
  static constexpr T value = v;
};
}  // namespace std
#else
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#endif
