"""Three steps of 512 Mi elements for Nsight Compute: what limits the kernels.

ncu --clock-control none --kernel-name regex:step_vectors --csv --metrics $(python bench/ncu_step.py --metrics) \
    python bench/ncu_step.py bfloat16
"""

import sys

METRICS = (
    "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,smsp__inst_executed.sum,smsp__issue_active.avg.pct_of_peak_sustained_active,"
    "launch__registers_per_thread"
)

if __name__ == "__main__":
    if sys.argv[1] == "--metrics":
        print(METRICS)
        sys.exit()

    import torch

    from ersde_fast import er_sde_plan, fast_step

    dtype = getattr(torch, sys.argv[1])
    x, *history = (torch.randn(1, 512 << 20, dtype=dtype, device="cuda") for _ in range(4))
    sigmas = [10.0, 8.0, 6.0, 4.0, 2.0]
    fast_step(er_sde_plan(sigmas, order=3, noise_scaler="ode"), 3, x, history)
    fast_step(er_sde_plan(sigmas, order=3), 3, x, history, seed=1)
    fast_step(er_sde_plan(sigmas, order=3), 3, x, history)
