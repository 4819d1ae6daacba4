// Force-included by tests: makes er_sde_step.cu a C++ file whose kernels run one thread after another on the CPU, so that the
// address and undefined-behaviour sanitizers watch their index arithmetic. No shared memory, no barriers, no shuffles.
#pragma once
#include <cuda_bf16.h>  // CUDA's own headers first: they define the words below as attributes that g++ does not know
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

static thread_local uint3 blockIdx{}, threadIdx{};
static thread_local dim3 gridDim, blockDim;

template <typename Kernel, typename Args>
void run_every_thread(Kernel kernel, dim3 grid, dim3 block, const Args& args) {
  gridDim = grid;
  blockDim = block;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      for (unsigned t = 0; t < block.x; ++t) {
        blockIdx = uint3{x, y, 0};
        threadIdx = uint3{t, 0, 0};
        kernel(args);
      }
    }
  }
}
#define ERSDE_LAUNCH(kernel, grid, block, stream, args, ...) ((void)(stream), run_every_thread(kernel, grid, block, args))
