"""The order and the node_scale of each step where neither is named, chosen by the step's levels and the model's guidance.

Above er_lambda 1 guidance multiplies what extrapolation amplifies, so steps there have order 2, and their history is the less
bent (its node_scale the larger) the longer the step is and the stronger guidance is. Below it predictions are smooth: order 3 and
NODE_SCALE, as without guidance everywhere. docs/quality.md says what was measured. csrc/er_sde_plan.h has the same.
"""

import torch
from torch import Tensor

ORDER = 3
NODE_SCALE = 10.0
UNTOLD = 2.5  # the guidance of a model of which nothing is said


def chosen(er_lambda_s: Tensor, er_lambda_t: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
    """Orders and node_scales of steps.

    Args:
        er_lambda_s, er_lambda_t: [num_steps] float64, where the steps begin and end.
        guidance: 1 is none.
    """
    extrapolates = (er_lambda_s > 1) & (guidance >= 2)
    scales = torch.where(extrapolates, 4 * guidance * er_lambda_s / er_lambda_t, NODE_SCALE)
    return torch.where(extrapolates, 2, ORDER), scales
