// A plan's table on CUDA: a warp a step, whose lanes share out the points of its integrals.
#include "er_sde_launch.h"
#include "er_sde_plan.h"

namespace ersde {
namespace {

#ifdef __CUDACC__
constexpr int kLanes = 32;

struct Warp {
  __device__ int index() const { return threadIdx.x; }
  __device__ int count() const { return kLanes; }
  __device__ double sum(double v) const {
    for (int distance = kLanes / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, distance);
    return v;
  }
};
#else  // run as C++ by tests, one thread after another
constexpr int kLanes = 1;
using Warp = OneLane;
#endif

__global__ void __launch_bounds__(kLanes) plan_rows(const __grid_constant__ PlanArgs a) { plan_row(a, blockIdx.x, Warp()); }

}  // namespace

#ifndef __CUDACC_RTC__
const char* plan_cuda(const PlanArgs& a, void* stream) {
  ERSDE_LAUNCH(plan_rows, dim3((unsigned)a.num_steps), dim3(kLanes), stream, a);
  return launch_error();
}
#endif

}  // namespace ersde
