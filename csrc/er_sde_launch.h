// How a kernel is launched, and what the launch said. Tests that run the kernels as C++ define ERSDE_LAUNCH themselves.
#pragma once

#ifndef ERSDE_LAUNCH
#include <cuda_runtime.h>
#define ERSDE_LAUNCH(kernel, grid, block, stream, args) kernel<<<grid, block, 0, (cudaStream_t)(stream)>>>(args)
#endif

namespace ersde {
namespace {

// nullptr where the last launch was taken.
inline const char* launch_error() {
#ifdef __CUDACC__
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  return nullptr;
#endif
}

}  // namespace
}  // namespace ersde
