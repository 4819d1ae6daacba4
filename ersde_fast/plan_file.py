"""Plans as safetensors files: the levels and the weights as tensors, and what they were made with as JSON in the header."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import safetensors_for, write_whole
from .levels import CPU
from .noise_scaler import NoiseScaler, get_noise_scaler
from .plan import Plan, er_sde_plan, table_of_weights
from .report import CalibrationReport
from .table import W_NOISE
from .weights import PlanOptions

KEY = "ersde_fast_plan"  # of the header's metadata
REPORT = "ersde_fast_calibration"  # and of a calibrated plan
VERSION = 1
SAID = tuple(field.name for field in fields(PlanOptions))


def save(plan: Plan, path: str | os.PathLike) -> None:
    """See `Plan.save`."""
    path, plan = Path(path), plan.predicting("sample").to(CPU)
    if not plan.weights.isfinite().all():
        raise ValueError(f"the plan to be saved as {path} has a step that cannot be: plan.check() says why")
    if plan.noise_scaler is not None and not _is_named(plan.noise_scaler):
        raise ValueError(
            f"noise_scaler {plan.noise_scaler.name} is a function, which no file can hold: save "
            f"Plan.from_weights(plan.weights, plan.sigmas, plan.alphas), which has the same steps"
        )
    tensors = {"sigmas": plan.sigmas, "weights": plan.weights}
    if plan.process is None:
        tensors["alphas"] = plan.alphas
    metadata = {KEY: json.dumps({"version": VERSION, **_said_of(plan)})}
    if plan.report is not None:
        metadata[REPORT] = json.dumps(plan.report._asdict())
    write_whole(path, safetensors_for("Plan.save").save(tensors, metadata=metadata))


def load(path: str | os.PathLike) -> Plan:
    """See `Plan.load`."""
    tensors, said, report = _read(Path(path))
    try:
        return replace(_plan_of(tensors, said), report=_report_of(report))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} holds no plan that ersde-fast saved: {error}") from None


def _said_of(plan: Plan) -> dict:
    """What a plan is made with, as JSON has it."""
    said = {name: getattr(plan, name) for name in SAID}
    said["noise_scaler"] = None if plan.noise_scaler is None else plan.noise_scaler.name
    said["orders"] = list(plan.orders)
    if isinstance(plan.eta, Tensor):
        said["eta"] = plan.eta.tolist()
    elif isinstance(plan.eta, tuple):
        said["eta"] = list(plan.eta)
    return said


def _is_named(noise_scaler: NoiseScaler) -> bool:
    """Whether its name says all of it."""
    try:
        return get_noise_scaler(noise_scaler.name) == noise_scaler
    except ValueError:
        return False


def _report_of(said: dict | None) -> CalibrationReport | None:
    """The report of a calibrated plan, checked."""
    if said is None:
        return None
    kinds = CalibrationReport.__annotations__
    if said.keys() != kinds.keys():
        raise ValueError(f"its calibration must say {', '.join(kinds)}, and says {', '.join(said) or 'nothing'}")
    numbers = {name: value for name, value in said.items() if kinds[name] is float}
    if not all(type(value) in (int, float) for value in numbers.values()) or type(said["calibrated"]) is not bool:
        raise TypeError(f"its calibration must be of numbers, got {said}")
    fitted, held_back = said["starts"]
    return CalibrationReport(**{**said, **{k: float(v) for k, v in numbers.items()}, "starts": (int(fitted), int(held_back))})


def _read(path: Path) -> tuple[dict[str, Tensor], dict, dict | None]:
    """The tensors of a file, what its header says of the plan, and of its calibration."""
    safetensors_for("Plan.load")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            said, report = metadata.get(KEY), metadata.get(REPORT)
            if said is None:
                raise ValueError("its header says nothing of a plan")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        said = json.loads(said)
        if not isinstance(said, dict) or said.get("version") != VERSION:
            raise ValueError(f"its header must be of version {VERSION}: another ersde-fast wrote it")
        report = None if report is None else json.loads(report)
        if not isinstance(report, dict | None):
            raise ValueError(f"its calibration must be an object, got {report!r}")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of a plan, or damaged: {error}") from None
    return tensors, {name: value for name, value in said.items() if name != "version"}, report


def _plan_of(tensors: dict[str, Tensor], said: dict) -> Plan:
    """The plan of what a file holds, all of it checked: its levels and options make a plan, which has the weights of the file."""
    if said.keys() != set(SAID):
        raise ValueError(f"it must say {', '.join(SAID)}, and says {', '.join(said) or 'nothing'}")
    names = {"sigmas", "weights"} | ({"alphas"} if said["process"] is None else set())
    if tensors.keys() != names or any(tensor.dtype != torch.float64 for tensor in tensors.values()):
        held = ", ".join(f"{name} ({tensor.dtype})" for name, tensor in sorted(tensors.items()))
        raise ValueError(f"it must hold {', '.join(sorted(names))} as torch.float64, and holds {held or 'nothing'}")
    first_step, weights = said["first_step"], tensors["weights"]
    if type(first_step) is not int or not 0 <= first_step < 2**63:
        raise ValueError(f"first_step must be a whole number from 0 to 2^63, got {first_step!r}")
    made = replace(_made_with(tensors, said), first_step=first_step)
    for name, value in _said_of(made).items():
        if said[name] != value:
            raise ValueError(f"its {name} must be {value!r} beside all else that it says, got {said[name]!r}")
    table = table_of_weights(weights, made.num_steps, first_step)
    if table.shape != made.table.shape:
        raise ValueError(f"weights must have shape {tuple(made.weights.shape)}, got {tuple(weights.shape)}")
    sizes = made.weights.abs().amax(1, keepdim=True)
    if (far := ((weights - made.weights).abs() > 1e-9 * sizes).any(1)).any():
        raise ValueError(f"its weights of step {int(far.nonzero()[0])} are not those of what it says that it was made with")
    return replace(made, table=table, draws=bool((table[:, W_NOISE] != 0).any()))


def _made_with(tensors: dict[str, Tensor], said: dict) -> Plan:
    """The plan of the levels and the options of a file."""
    levels: dict[str, Any] = {"sigmas": tensors["sigmas"], "alphas": tensors.get("alphas")}
    levels |= {"process": "ve" if said["process"] is None else said["process"], "sigma_data": said["sigma_data"]}
    if said["method"] is None:
        return Plan.from_weights(tensors["weights"], **levels)
    if not isinstance(said["noise_scaler"], str):
        raise TypeError(f"noise_scaler must be a name, got {said['noise_scaler']!r}")
    options = {name: said[name] for name in ("noise_scaler", "s_noise", "eta", "guidance", "integration_points")}
    if said["guidance"] is None:  # else it chooses these
        options |= {"order": said["orders"], "method": said["method"], "node_scale": said["node_scale"]}
    return er_sde_plan(**levels, **options)
