// Force-included by tests: makes the kernels C++ whose threads run one after another on the CPU, so that the address and
// undefined-behaviour sanitizers watch their index arithmetic. Where threads wait for each other, each has a stack of its own.
#pragma once
#include <cuda_bf16.h>  // CUDA's own headers first: they define the words below as attributes that g++ does not know
#include <cuda_fp16.h>

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

static thread_local uint3 blockIdx{}, threadIdx{};
static thread_local dim3 gridDim, blockDim;

// Threads of a block that wait for each other: the one that waits lets the next run, up to where it waits too. All threads of a warp
// come to the same shuffles, and all of a block that have not returned to the same barriers.
struct Together {
  ucontext_t scheduler;
  std::vector<ucontext_t> threads;
  std::vector<bool> done;
  unsigned now = 0;
  double shuffled[1024];

  void wait() { swapcontext(&threads[now], &scheduler); }

  template <typename Kernel, typename Args>
  void run(Kernel kernel, unsigned count, const Args& args) {
    static std::vector<char> stacks;
    constexpr size_t size = 1 << 16;
    stacks.resize(size * 1024);
    threads.resize(count);
    done.assign(count, false);
    static Kernel its_kernel;
    static const Args* its_args;
    its_kernel = kernel;
    its_args = &args;
    for (unsigned t = 0; t < count; ++t) {
      getcontext(&threads[t]);
      threads[t].uc_stack.ss_sp = stacks.data() + size * t;
      threads[t].uc_stack.ss_size = size;
      threads[t].uc_link = &scheduler;
      makecontext(&threads[t], [] { its_kernel(*its_args); }, 0);
    }
    for (unsigned left = count; left > 0;) {
      for (now = 0; now < count; ++now) {
        if (done[now]) continue;
        threadIdx = uint3{now, 0, 0};
        done[now] = true;  // unless it comes back by waiting
        swapcontext(&scheduler, &threads[now]);
        left -= done[now];
      }
    }
  }
};
static Together together;

inline void __syncthreads() {
  together.done[together.now] = false;
  together.wait();
}
inline double __shfl_down_sync(unsigned, double value, int lanes) {
  const unsigned from = together.now + lanes;
  together.shuffled[together.now] = value;
  __syncthreads();
  const double got = from / 32 == together.now / 32 ? together.shuffled[from] : value;
  __syncthreads();  // before it is written over
  return got;
}

// Whether threads of the kernels with these arguments wait for each other.
template <typename Args>
constexpr bool wait_for_each_other = false;

template <typename Kernel, typename Args>
void run_every_thread(Kernel kernel, dim3 grid, dim3 block, const Args& args) {
  gridDim = grid;
  blockDim = block;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = uint3{x, y, 0};
      if constexpr (wait_for_each_other<Args>) {
        together.run(kernel, block.x, args);
        continue;
      }
      for (unsigned t = 0; t < block.x; ++t) {
        threadIdx = uint3{t, 0, 0};
        kernel(args);
      }
    }
  }
}
#define ERSDE_LAUNCH(kernel, grid, block, stream, args, ...) ((void)(stream), run_every_thread(kernel, grid, block, args))
