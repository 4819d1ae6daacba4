"""The table of a plan: what a row of it holds and where, and a row as Python numbers. csrc/er_sde_step.h has the same columns."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .noise import float64_device
from .predictions import PREDICTION_TYPES, Factors, factors_of
from .tracing import without_tracers

# What every row holds, and then w_d[0] ... w_d[order - 1].
COUNTER, P_X, P_M, W_GUIDE, W_NOISE, W_X, W_D = range(7)


class Row(NamedTuple):
    """One step as Python numbers; or, where only a device or a tracer knows them, as tensors.

    Attributes:
        w_x, w_noise: the weights of x and of the noise.
        w_d: those of the predictions, newest first; of `Plan.rows` they end at the oldest that the step reads.
        prediction: the factors of x and of a model's output in the prediction, of the type that the table holds.
        w_guide: by CFG++ the weight of the output without the condition in the next sample; else 0.
        counter: of its portable noise.
    """

    w_x: float
    w_d: tuple[float, ...]
    w_noise: float
    prediction: tuple[float, float]
    w_guide: float
    counter: int | Tensor

    @classmethod
    def of(cls, columns: Sequence) -> "Row":
        """From the columns of a table, numbers or tensors; `w_d` has the length of the order."""
        counter = columns[COUNTER]
        return cls(
            columns[W_X],
            tuple(columns[W_D:]),
            columns[W_NOISE],
            (columns[P_X], columns[P_M]),
            columns[W_GUIDE],
            counter.long() if isinstance(counter, Tensor) else int(counter),
        )


@dataclass(frozen=True, eq=False)
class Table:
    """What plans and stacks of plans share: rows that say all that a step needs, on one device.

    Attributes:
        table: float64 [..., num_steps, W_D + order].
        draws: whether any step adds noise; of a plan on a device, whether one can.
        prediction_type: of the factors in `table`.
        cfg_pp: whether its weights are those of the step by CFG++ from outputs of that type.
    """

    table: Tensor
    draws: bool
    prediction_type: str = field(default="sample", kw_only=True)
    cfg_pp: bool = field(default=False, kw_only=True)

    @property
    def num_steps(self) -> int:
        return self.table.shape[-2]

    @property
    def order(self) -> int:
        """The largest order of any step."""
        return self.table.shape[-1] - W_D

    @property
    def weights(self) -> Tensor:
        """float64 [..., num_steps, order + 2], columns w_x | w_d[0] ... w_d[order - 1] | w_noise."""
        return torch.cat([self.table[..., W_X:], self.table[..., W_NOISE : W_NOISE + 1]], dim=-1)

    def levels(self) -> tuple[Tensor, Tensor]:
        """The alpha and sigma that each step starts from, [..., num_steps]."""
        raise NotImplementedError

    def data_std(self) -> Tensor | None:
        """sigma_data, in a shape that broadcasts with the levels; None where it was not told."""
        raise NotImplementedError

    def predicting(self, prediction_type: str | None, cfg_pp: bool = False):
        """The same with the factors of a prediction type in its table; made once for each. None is any, and the same.

        Args:
            cfg_pp: with the weights of the step by CFG++ (arXiv 2406.08070), which moves by the guided prediction D_g and renoises
                by the unconditional one D_u: w_x alpha (D_g - D_u) is added to the step. D_u = p_x x + p_m unconditional, so
                that is w_x alpha more of D_g, w_x alpha p_x less of x, and w_x alpha p_m less of the unconditional output.

        Raises:
            KeyError: there is no such type.
            ValueError: the type needs what the plan was not told.
        """
        if prediction_type is None or (prediction_type, cfg_pp) == (self.prediction_type, self.cfg_pp):
            return self
        if self.cfg_pp:
            raise ValueError(f'the plan is one of CFG++ from "{self.prediction_type}": take the plan that it was made of')
        if torch.compiler.is_dynamo_compiling():
            return Table(self._made_for(prediction_type, cfg_pp), self.draws, prediction_type=prediction_type, cfg_pp=cfg_pp)
        factors = PREDICTION_TYPES[prediction_type], cfg_pp  # what is kept is of the function, whose name may get another
        made = self._predicting.get(factors)
        if made is None:
            with without_tracers():
                table = self._made_for(prediction_type, cfg_pp)
                made = replace(self, table=table, prediction_type=prediction_type, cfg_pp=cfg_pp)
            if not (self.table.is_cuda and torch.cuda.is_current_stream_capturing()):  # memory of the graph's own
                self._predicting[factors], self.tables[factors] = made, made.table
        return made

    def _made_for(self, prediction_type: str, cfg_pp: bool) -> Tensor:
        """The table of a type, for the step by CFG++ or without."""
        table = self._with_factors(prediction_type)
        if not cfg_pp:
            return table
        alpha, _ = self.levels()
        p_x, p_m, w_x = (table[..., column] for column in (P_X, P_M, W_X))
        renoised = w_x * alpha
        of_x = torch.where(alpha > 0, w_x - renoised * p_x, w_x)  # p_x may be infinite where alpha is 0
        of_guide = torch.where(alpha > 0, -renoised * p_m, 0.0)
        newest = table[..., W_D] + renoised
        return torch.cat(
            [table[..., :W_GUIDE], of_guide[..., None], table[..., W_NOISE : W_NOISE + 1], of_x[..., None], newest[..., None],
             table[..., W_D + 1 :]], dim=-1,
        )  # fmt: skip

    def _with_factors(self, prediction_type: str) -> Tensor:
        alpha, sigma = self.levels()
        p_x, p_m = factors_of(prediction_type, alpha, sigma, self.data_std())
        if not all(isinstance(p, Tensor) and p.shape == alpha.shape for p in (p_x, p_m)):
            raise TypeError(
                f'prediction type "{prediction_type}" must be a function to two tensors of the shape of alpha, {tuple(alpha.shape)}, '
                f"got {p_x!r} and {p_m!r}"
            )
        return torch.cat([self.table[..., :P_X], torch.stack([p_x, p_m], dim=-1), self.table[..., W_GUIDE:]], dim=-1)

    def to(self, device: torch.device | str):
        """The same with its tensors on a device, for steps whose index lies there; made once for each device.

        Raises:
            TypeError: the device has no float64.
        """
        if float64_device(torch.device(device)) != torch.device(device):
            raise TypeError(f"a plan is float64, which {device} has not: leave it on the CPU, where steps on {device} find it")
        device = torch.empty(0, device=device).device  # with its index
        if device == self.table.device:
            return self
        if device not in self._copies:
            with without_tracers():
                values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
                moved: dict[str, Any] = {k: value.to(device) for k, value in values.items() if isinstance(value, Tensor)}
            self._copies[device] = replace(self, **moved)
        return self._copies[device]

    def __getstate__(self) -> dict:
        """What is pickled: not what is kept for the next call."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict) -> None:
        if state.keys() != {f.name for f in fields(self)}:
            raise ValueError(
                "the plan was pickled by another version of ersde-fast, whose tables mean something else: build it anew"
            )
        self.__dict__.update(state)

    @cached_property
    def tables(self) -> dict[tuple[Factors, bool], Tensor]:
        """The tables of the types that are in use, by CFG++ or without."""
        if self.prediction_type not in PREDICTION_TYPES:
            return {}
        return {(PREDICTION_TYPES[self.prediction_type], self.cfg_pp): self.table}

    @cached_property
    def _copies(self) -> dict:
        return {}

    @cached_property
    def _predicting(self) -> dict:
        return {}
