"""The weights of every step, on the host: integrals of the noise scaler against the polynomial through the earlier predictions.

csrc/er_sde_plan.h has the same for plans of named scalers, on the host and on CUDA devices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .choice import chosen
from .levels import CPU, EPS, Levels, Process
from .noise_scaler import NoiseScaler
from .table import W_D, W_NOISE, W_X

Method = Literal["newton", "taylor"]

Eta = float | tuple[float, ...] | Tensor

_GAUSS_X, _GAUSS_W = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(16))


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanOptions:
    """What a plan is made with beside its levels; checked. Of a plan whose weights were given all is None but process, orders,
    first_step and sigma_data.

    Attributes:
        process: where the alphas come from; None where they are given.
        orders: the order asked for at each step; where `guidance` chooses it, the largest that it may choose.
        noise_scaler, s_noise: of the noise.
        eta: the strength of the noise scaler: one of all steps, or one of each; float64 [num_steps] on the device of the plan where
            only that knows them.
        method: "newton" or "taylor".
        node_scale: of every step; None where `guidance` chooses it.
        integration_points: of the left Riemann sums, or None.
        guidance: what order and node_scale of each step are chosen for; None where they are named.
        first_step: step i draws the portable noise of step `first_step + i`.
        sigma_data: of the network, for prediction_type "edm"; or None.
    """

    process: Process | None
    orders: tuple[int, ...]
    noise_scaler: NoiseScaler | None
    method: Method | None
    node_scale: float | None
    integration_points: int | None
    s_noise: float | None
    eta: Eta | None
    guidance: float | None
    first_step: int = 0
    sigma_data: float | None = None


def fill_weights(table: Tensor, levels: Levels, options: PlanOptions) -> None:
    """Fills in the weights of a table of zeros, and checks their invariants."""
    sigmas, alphas, er_lambdas, repeated = levels
    l_s, l_t = er_lambdas[:-1], er_lambdas[1:]
    order, noise_scaler = max(options.orders), options.noise_scaler
    if options.guidance is None:
        orders, node_scales = torch.tensor(options.orders, device=CPU), torch.full_like(l_s, options.node_scale)
    else:
        orders, node_scales = chosen(l_s, l_t, options.guidance)

    still = repeated | (l_s == l_t)
    ratio = torch.where(alphas[:-1] > 0, alphas[1:] / alphas[:-1], sigmas[1:] / sigmas[:-1])
    table[:, W_X] = torch.where(repeated, 1.0, torch.where(still, ratio, 0.0))
    last = (l_t == 0) & ~still
    table[:, W_D] = torch.where(last, alphas[1:], 0.0)

    steps = (~still & ~last).nonzero()[:, 0]
    if len(steps) == 0:
        return
    l_s, l_t, alpha_t, sigma_t = l_s[steps], l_t[steps], alphas[1:][steps], sigmas[1:][steps]
    distance = _log_ratio(l_s, l_t)
    etas = each_eta(options.eta, len(table), CPU)[steps]
    log_rho = -noise_scaler.log_growth(l_t, distance, etas)
    inadmissible = ~(log_rho <= 8 * EPS)
    if inadmissible.any():
        at = int(inadmissible.nonzero()[0])
        raise ValueError(
            f"noise_scaler {noise_scaler.name} is inadmissible at step {int(steps[at])}: phi(l) / l must not decrease with l, "
            f"but does from er_lambda {l_t[at].item()} to {l_s[at].item()}; use another noise_scaler or a shorter schedule"
        )
    log_rho = torch.where(log_rho >= -8 * EPS, 0.0, log_rho)
    table[steps, W_X] = sigma_t / sigmas[:-1][steps] * torch.exp(log_rho)
    table[steps, W_NOISE] = options.s_noise * sigma_t * torch.sqrt(torch.expm1(2 * log_rho).abs())
    total = -alpha_t * torch.expm1(log_rho - distance)
    table[steps, W_D] = total

    uses = _distinct_nodes(er_lambdas, still, orders, node_scales)[steps]
    for n in range(2, order + 1):
        rows = (uses.sum(1) == n).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        slots = torch.argsort((~uses[rows]).to(torch.uint8), dim=1, stable=True)[:, :n]
        nodes, scales = er_lambdas[steps[rows, None] - slots], node_scales[steps[rows]]
        growth = _growth(noise_scaler, l_t[rows], etas[rows])
        panel = _panels(l_s[rows], l_t[rows], growth, scales, options.integration_points)
        rule = {"newton": _newton, "taylor": _taylor}[options.method]
        table[steps[rows, None], W_D + slots] += alpha_t[rows, None] * rule(panel, nodes, scales)

    weights, w_d = table[:, W_NOISE:], table[steps, W_D:]
    exact = (w_d.sum(1) - total).abs() <= 1e-10 * w_d.abs().sum(1)
    if not (torch.isfinite(weights).all() and exact.all()):
        broken = ~(torch.isfinite(weights[steps]).all(1) & exact)
        at = int(steps[int(broken.nonzero()[0])]) if broken.any() else int((~torch.isfinite(weights).all(1)).nonzero()[0])
        raise ValueError(
            f"sigmas give no finite, consistent weights at step {at}, from er_lambda {er_lambdas[at].item()} "
            f"to {er_lambdas[at + 1].item()}; space the schedule more evenly or lower the order there"
        )


def each_eta(eta: Eta, num_steps: int, device: torch.device) -> Tensor:
    """The strengths of a plan's steps, float64 [num_steps] on its device."""
    if not isinstance(eta, Tensor):
        eta = torch.tensor(eta, dtype=torch.float64, device=CPU).to(device, non_blocking=True)
    return eta.expand(num_steps)


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log(a / b) for a >= b > 0, to full relative precision where they are close."""
    return torch.where(a < 2 * b, torch.log1p((a - b) / b), torch.log(a) - torch.log(b))


def _distinct_nodes(er_lambdas: Tensor, still: Tensor, orders: Tensor, node_scales: Tensor) -> Tensor:
    """Which of the order newest predictions each step interpolates, [num_steps, order] of bool.

    Of repeated nodes only the newest counts; a node at infinity counts only where node_scale makes it an ordinary one.
    """
    num_steps, order = len(orders), int(orders.max())
    step, slot = torch.arange(num_steps, device=CPU)[:, None], torch.arange(order, device=CPU)
    node = (step - slot).clamp(min=0)
    usable = (slot <= step) & (slot < orders[:, None])
    usable &= (slot == 0) | ~still[node]
    return usable & ((slot == 0) | torch.isfinite(er_lambdas[node]) | torch.isfinite(node_scales)[:, None])


def _growth(noise_scaler: NoiseScaler, l_t: Tensor, etas: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Of steps: log(psi / l) at `l_t exp(y)` less its value at l_t, from rows [n] and distances y [n, points]."""
    return lambda row, y: noise_scaler.log_growth(l_t[row, None], y, etas[row, None])


class _Panels(NamedTuple):
    """Quadrature of `integral from l_t to l_s of (1 - phi_t / phi(l)) f(l) dl` over many steps at once.

    Panel p belongs to row `row[p]`, has nodes `l[p]` and weights `w[p]` that hold the kernel and the measure.
    """

    row: Tensor
    l: Tensor
    w: Tensor
    num_rows: int

    def integrate(self, f: Tensor) -> Tensor:
        return torch.zeros(self.num_rows, dtype=torch.float64, device=CPU).index_add_(0, self.row, (self.w * f).sum(1))


def _panels(l_s: Tensor, l_t: Tensor, growth: Callable, node_scale: Tensor, points: int | None) -> _Panels:
    if points is not None:
        # Existing samplers sum only the 1/phi part, from the left; the part without it they integrate exactly. Their rule
        # is kept as it is: the weight of the exact part is carried by two nodes that integrate linear functions.
        return _riemann_panels(l_s, l_t, growth, points)
    reach = torch.minimum(_log_ratio(l_s, l_t), math.log(1e17) + torch.log(torch.maximum(l_t, node_scale)) - torch.log(l_t))
    count = torch.ceil(reach / 2).clamp(min=1).long()
    row, index = (torch.arange(int(count.max()), device=CPU) < count[:, None]).nonzero(as_tuple=True)
    width = (reach / count)[row, None]
    y = width * (index[:, None] + (1 + _GAUSS_X) / 2)
    l = l_t[row, None] * torch.exp(y)
    kernel = -torch.expm1(-(y + growth(row, y)))
    return _Panels(row, l, kernel * l * width / 2 * _GAUSS_W, len(l_s))


def _riemann_panels(l_s: Tensor, l_t: Tensor, growth: Callable, points: int) -> _Panels:
    h = ((l_s - l_t) / points)[:, None]
    l = l_t[:, None] + h * torch.arange(points, dtype=torch.float64, device=CPU)
    y = _log_ratio(l, l_t[:, None])
    row = torch.arange(len(l_s), device=CPU)
    inverse = torch.exp(-(y + growth(row, y)))
    ends = torch.stack([l_t, l_s], dim=1)
    half = ((l_s - l_t) / 2)[:, None].expand(-1, 2)
    return _Panels(row, torch.cat([ends, l], dim=1), torch.cat([half, -h * inverse], dim=1), len(l_s))


def _taylor(panels: _Panels, nodes: Tensor, node_scale: Tensor) -> Tensor:
    """The paper's rule, less the order-1 term: one-sided differences of the history in a Taylor expansion about l_s."""
    l_s = nodes[:, 0]
    c_1 = -panels.integrate(torch.ones_like(panels.l))
    g_1 = l_s - nodes[:, 1]
    k = c_1 / g_1
    if nodes.shape[1] == 2:
        return torch.stack([k, -k], dim=1)
    c_2 = -panels.integrate(panels.l - l_s[panels.row, None])
    g_2 = nodes[:, 1] - nodes[:, 2]
    e = 2 * c_2 / (g_1 + g_2)
    return torch.stack([k + e / g_1, -(k + e * (1 / g_1 + 1 / g_2)), e / g_2], dim=1)


def _newton(panels: _Panels, nodes: Tensor, node_scale: Tensor) -> Tensor:
    """Less the order-1 term: -integral of (1 - phi_t / phi) dL_j(u(l)) for every Lagrange basis polynomial L_j on the nodes."""
    n = nodes.shape[1]
    scale = node_scale[panels.row, None]
    from_node = [_u_difference(panels.l, nodes[panels.row, k, None], scale) for k in range(n)]
    du_dl = (1 + panels.l / scale) ** -2
    columns = []
    for j in range(n):
        others = [k for k in range(n) if k != j]
        numerator = sum(math.prod(from_node[k] for k in others if k != m) for m in others)
        denominator = math.prod(_u_difference(nodes[:, j], nodes[:, k], node_scale) for k in others)
        columns.append(-panels.integrate(numerator * du_dl) / denominator)
    return torch.stack(columns, dim=1)


def _u_difference(a: Tensor, b: Tensor, node_scale: Tensor) -> Tensor:
    """u(a) - u(b) for u(l) = l / (1 + l / node_scale), without cancellation; a or b may be infinite if node_scale is not."""
    difference = (a - b) / ((1 + a / node_scale) * (1 + b / node_scale))
    difference = torch.where(torch.isinf(a), node_scale / (1 + b / node_scale), difference)
    return torch.where(torch.isinf(b), -node_scale / (1 + a / node_scale), difference)
