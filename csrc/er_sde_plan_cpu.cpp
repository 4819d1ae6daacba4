// A plan's table on the CPU, by the code that the CUDA kernel runs.
#include "er_sde_plan.h"

namespace ersde {

void plan_cpu(const PlanArgs& args) {
  for (int64_t i = 0; i < args.num_steps; ++i) plan_row(args, i, OneLane());
}

}  // namespace ersde
