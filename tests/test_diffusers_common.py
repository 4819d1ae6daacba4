"""diffusers' own scheduler tests on ERSDEScheduler, from the checkout of diffusers that DIFFUSERS_CHECKOUT names.

diffusers ships no tests in its wheel, so without a checkout there is nothing here to collect; test_diffusers.py covers the same
ground by itself.
"""

import os
import sys

import pytest

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")

if CHECKOUT:
    sys.path.insert(0, CHECKOUT)
    from tests.schedulers.test_scheduler_dpm_multi import DPMSolverMultistepSchedulerTest as OfDPMSolver
    from tests.schedulers.test_schedulers import SchedulerCommonTest

    from ersde_fast.integrations.diffusers import ERSDEScheduler

    NOT_OURS = ("algorithm_type", "solver_type", "euler_at_final")

    class TestCommon(SchedulerCommonTest):
        scheduler_classes = (ERSDEScheduler,)
        forward_default_kwargs = (("num_inference_steps", 25),)

        def get_scheduler_config(self, **kwargs):
            return {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", **kwargs}

        @pytest.mark.skip(reason="steps twice from timestep 1, the run's last; multistep schedulers' own tests replace it")
        def test_step_shape(self):
            pass

    class TestMultistep(OfDPMSolver):
        """The tests of DPM-Solver's scheduler. Those set to None do not apply: they compare with its own numbers (the full loops, and the
        switch, which compares with a loop's number), or with its own kinds of solver and of last step."""

        scheduler_classes = (ERSDEScheduler,)

        def get_scheduler_config(self, **kwargs):
            config = super().get_scheduler_config(**kwargs)
            ours = {key: value for key, value in config.items() if key not in NOT_OURS}
            return {**ours, "seed": 0}  # they compare two runs without a generator

        test_solver_order_and_type = test_euler_at_final = test_switch = None
        test_full_loop_no_noise = test_full_loop_with_noise = test_full_loop_no_noise_thres = None
        test_full_loop_with_v_prediction = test_full_loop_with_karras_and_v_prediction = None
        test_full_loop_with_lu_and_v_prediction = test_full_loop_with_noise_flow = None

    del SchedulerCommonTest, OfDPMSolver
