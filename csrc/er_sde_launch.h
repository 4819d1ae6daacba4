// How a kernel is launched, and what the launch said. Tests that run the kernels as C++ define ERSDE_LAUNCH themselves.
#pragma once

#if !defined(ERSDE_LAUNCH) && !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#define ERSDE_LAUNCH ersde::launch
#endif

namespace ersde {
namespace {

#if defined(__CUDACC__) && !defined(__CUDACC_RTC__)
// early: the kernel's blocks may start while the kernel before it in the stream still runs; it calls wait_for_the_kernel_before.
// For devices of compute capability 9.0 and newer (programmatic dependent launch); in a graph it takes a microsecond off each node.
template <typename Args>
void launch(void (*kernel)(Args), dim3 grid, dim3 block, void* stream, const Args& args, bool early = false) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, args);
}
#endif

// Lets the kernel behind this one start early. What is read of memory that another kernel may have written comes after the
// second of them.
__device__ __forceinline__ void let_the_kernel_behind_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_the_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifndef __CUDACC_RTC__
// nullptr where the last launch was taken.
inline const char* launch_error() {
#ifdef __CUDACC__
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  return nullptr;
#endif
}
#endif

}  // namespace
}  // namespace ersde
