// How a kernel is launched, and what the launch said. Tests that run the kernels as C++ define ERSDE_LAUNCH themselves.
#pragma once

#if !defined(ERSDE_LAUNCH) && !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#define ERSDE_LAUNCH ersde::launch
#endif

namespace ersde {
namespace {

#if defined(__CUDACC__) && !defined(__CUDACC_RTC__)
// Whether something stands before the next kernel of a stream, in the stream or in the graph that is captured from it. The first
// kernel of a graph has nothing to wait for, and one that may start early reads what those before the graph have not written yet.
inline bool has_a_kernel_before(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaGraphNode_t* nodes = nullptr;
  size_t count = 0;
#if CUDART_VERSION >= 13000
  const cudaGraphEdgeData* edges = nullptr;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &nodes, &edges, &count);
#elif CUDART_VERSION >= 12030
  const cudaGraphEdgeData* edges = nullptr;
  const cudaError_t error = cudaStreamGetCaptureInfo_v3(stream, &status, nullptr, nullptr, &nodes, &edges, &count);
#else
  const cudaError_t error = cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, nullptr, &nodes, &count);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // the launch says what is wrong
  return error == cudaSuccess && (status == cudaStreamCaptureStatusNone || count > 0);
}

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
  config.numAttrs = early && has_a_kernel_before(config.stream) ? 1 : 0;
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
