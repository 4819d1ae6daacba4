"""`ER_SDE_Solver`: the interface of the authors' code (arXiv 2309.06169), so that code written for the paper runs as it is, faster.

What their code does otherwise, and this does not:

- it fails for order 2 of VE, and orders 2 and 3 of VP, with a schedule of tensors, and for every other method with one of NumPy;
- a VP schedule that ends at sigma 0 gives NaN in its orders 2 and 3: here the last step is the prediction;
- noise variances under 1e-6 are set to 0 there, which takes real noise away at small sigma;
- a `model_prediction_type` that it does not know makes it fail in the middle of the first step: here it is an error at once.

The integrals are its left Riemann sums of 100 points; `integration_points=None` takes them exactly.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import trange

from ..levels import on_host
from ..plan import Plan, er_sde_plan
from ..sample import Source, evaluate, with_newest
from ..step import fast_step

PREDICTION_TYPES = {"x_start": "sample", "noise": "epsilon"}


class ER_SDE_Solver:
    """Samples with the solvers of the paper.

    Args:
        sde_type: "ve" or "vp".
        model_prediction_type: "x_start" or "noise": what the model returns.
        integration_points: of the Riemann sums; None integrates exactly.

    A subclass chooses the noise scaler by overriding `customized_func`.

    Every method samples with `model(x, time, **model_kwargs)`, time [batch], and takes

        x: [batch, ...] the noise to start from, scaled to sigmas[0].
        alphas, sigmas: [num_steps + 1] signal and noise levels (VE: sigmas alone), tensors, arrays or lists, the last sigma
            usually 0.
        times: [num_steps] or longer, what the model is given for the time; None: the sigmas.
        progress: shows a progress bar.
        randn_like: draws the noise of a step; None is torch's own stream, drawn in the kernel.

    Source: arXiv 2309.06169 and its authors' code.
    """

    def __init__(self, sde_type: str = "ve", model_prediction_type: str = "x_start", integration_points: int | None = 100):
        if sde_type not in ("ve", "vp"):
            raise ValueError(f'sde_type must be "ve" or "vp", got {sde_type!r}')
        if model_prediction_type not in PREDICTION_TYPES:
            raise ValueError(f'model_prediction_type must be "x_start" or "noise", got {model_prediction_type!r}')
        self.sde_type = sde_type
        self.model_prediction_type = model_prediction_type
        self.integration_points = integration_points

    def customized_func(self, sigma: Tensor, func_type: int = 7, eta: float = 0) -> Tensor:
        """The noise scaler phi of er_lambdas, by its number in the authors' code (1 the ODE, 7 the paper's default).

        Args:
            eta: of func_type 3, whose phi is `sigma (exp(sigma^(eta - 1) / (eta - 1)) + 10)`.
        """
        power = {1: 1.0, 2: 2.0, 4: 1.5, 5: 2.5}
        if func_type in power:
            return sigma ** power[func_type]
        if func_type == 3:
            return sigma * (torch.exp(sigma ** (eta - 1) / (eta - 1)) + 10)
        if func_type == 6:
            return sigma**0.9 * torch.log10(1 + 100 * sigma**1.5)
        if func_type == 7:
            return sigma * (torch.exp(sigma**0.3) + 10)
        raise ValueError(f"func_type must be 1 to 7, got {func_type!r}")

    def ve_1_order(self, model, x, sigmas, times=None, progress=False, randn_like=None, **model_kwargs) -> Tensor:
        """VE, order 1."""
        return self._sample(self._plan("ve", 1, sigmas), model, x, times, progress, randn_like, model_kwargs)

    def ve_2_order_taylor(self, model, x, sigmas, times=None, progress=False, randn_like=None, **model_kwargs) -> Tensor:
        """VE, order 2."""
        return self._sample(self._plan("ve", 2, sigmas), model, x, times, progress, randn_like, model_kwargs)

    def ve_3_order_taylor(self, model, x, sigmas, times=None, progress=False, randn_like=None, **model_kwargs) -> Tensor:
        """VE, order 3."""
        return self._sample(self._plan("ve", 3, sigmas), model, x, times, progress, randn_like, model_kwargs)

    def vp_1_order(self, model, x, alphas, sigmas, times=None, progress=False, randn_like=None, **model_kwargs) -> Tensor:
        """VP, order 1."""
        return self._sample(self._plan("vp", 1, sigmas, alphas), model, x, times, progress, randn_like, model_kwargs)

    def vp_2_order_taylor(
        self, model, x, alphas, sigmas, times=None, progress=False, randn_like=None, **model_kwargs
    ) -> Tensor:
        """VP, order 2."""
        return self._sample(self._plan("vp", 2, sigmas, alphas), model, x, times, progress, randn_like, model_kwargs)

    def vp_3_order_taylor(
        self, model, x, alphas, sigmas, times=None, progress=False, randn_like=None, **model_kwargs
    ) -> Tensor:
        """VP, order 3."""
        return self._sample(self._plan("vp", 3, sigmas, alphas), model, x, times, progress, randn_like, model_kwargs)

    # The names in the authors' example for EDM.
    ve_xstart_1_order = ve_1_order
    ve_start_2_order_taylor = ve_2_order_taylor
    ve_start_3_order_taylor = ve_3_order_taylor

    def _plan(self, sde_type: str, order: int, sigmas, alphas=None) -> Plan:
        if sde_type != self.sde_type:
            raise ValueError(f'sde_type must be "{sde_type}" for this method, got "{self.sde_type}": name it at construction')
        named = type(self).customized_func is ER_SDE_Solver.customized_func
        return er_sde_plan(
            on_host(sigmas),
            on_host(alphas),
            order=order,
            noise_scaler="sde_5" if named else self.customized_func,
            method="taylor",
            integration_points=self.integration_points,
        )

    @torch.no_grad()
    def _sample(
        self, plan: Plan, model: Callable[..., Tensor], x: Tensor, times, progress: bool,
        randn_like: Callable[[Tensor], Tensor] | None, model_kwargs: dict,
    ) -> Tensor:  # fmt: skip
        precision = torch.promote_types(x.dtype, torch.float32)
        times = torch.as_tensor(plan.sigmas if times is None else times, dtype=precision, device=x.device)
        if len(times) < plan.num_steps:
            raise ValueError(f"times must hold {plan.num_steps} values, one for each evaluation, got {len(times)}")
        source = Source(None if randn_like is None else lambda: randn_like(x))
        prediction_type, history = PREDICTION_TYPES[self.model_prediction_type], []
        for i in trange(plan.num_steps, disable=not progress):
            output = evaluate(model, x, times[i] * times.new_ones(len(x)), **model_kwargs)
            history = with_newest(output, history, plan)
            x, history[0] = fast_step(plan, i, x, history, prediction_type=prediction_type, **source.of_step(plan, i))
        return x
