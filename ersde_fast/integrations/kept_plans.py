"""Plans from files, such as calibrated ones, in the variables of the tool that runs them."""

import torch
from torch import Tensor

from ..plan import Plan


def on_levels(plan: Plan, alphas: Tensor, sigmas: Tensor) -> Plan:
    """The plan of the same steps for samples at other alphas: a linear step of x / alpha is one of x."""
    er_lambdas = sigmas / alphas
    there, here = (torch.where(l.isinf(), -1.0, l) for l in (er_lambdas, plan.er_lambdas))
    if len(there) != len(here) or not torch.allclose(there, here, rtol=1e-6, atol=0):
        raise ValueError(f"sigmas must be the plan's, as sigma / alpha {here.tolist()}, got {there.tolist()}")
    scale = torch.where(plan.alphas > 0, alphas / plan.alphas, sigmas / plan.sigmas)
    weights = plan.weights * scale[1:, None]
    weights[:, 0] /= scale[:-1]
    return Plan.from_weights(weights, sigmas, alphas)
