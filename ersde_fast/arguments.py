"""What the step refuses, in words: every check of `fast_step` and `reference_step`, before anything is written or drawn."""

import math

import torch
from torch import Tensor

from .noise import MAX_POSITIONS, TORCH_PIECE, check_torch_layout, seeds_of

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_step(
    plan,
    i,
    x,
    history,
    noise=None,
    generator=None,
    seed=None,
    out=None,
    global_shape=None,
    global_start=None,
    torch_layout=None,
) -> None:
    """Raises ValueError or TypeError, naming the argument, for anything the step cannot do."""
    if not isinstance(i, int) or isinstance(i, bool):
        raise TypeError(f"i must be a whole number, the index of the step, got {i!r}")
    if not 0 <= i < plan.num_steps:
        raise ValueError(f"i must be 0 to {plan.num_steps - 1} (the plan has {plan.num_steps} steps), got {i}")
    _check_tensor("x", x)
    row = plan.rows[i]
    if not isinstance(history, (list, tuple)):
        raise TypeError(f"history must be a list of predictions, newest first, got {type(history).__name__}")
    if len(history) < len(row.w_d):
        raise ValueError(f"history must hold the {len(row.w_d)} newest predictions at step {i}, got {len(history)}")
    for j, denoised in enumerate(history[: len(row.w_d)]):
        _check_like(f"history[{j}]", denoised, x)
    check_one_source(noise=noise, generator=generator, seed=seed)
    if noise is not None:
        _check_like("noise", noise, x)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if generator.device.type != x.device.type or (generator.device.index or 0) != (x.device.index or 0):
            raise ValueError(f"generator must be on the device of x, {x.device}, got one on {generator.device}")
    if seed is not None:
        seeds_of(seed, x)
    _check_shard(x, seed, global_shape, global_start)
    if torch_layout is not None:
        check_torch_layout(torch_layout)
        if noise is not None or seed is not None:
            raise ValueError("torch_layout names torch's stream: give it without noise= and seed=")
        if x.numel() * x.element_size() > TORCH_PIECE:
            raise ValueError(f"torch_layout needs x below 2 GiB, got {tuple(x.shape)}: torch draws larger tensors in pieces")
    if out is not None:
        _check_out(out, x, history[: len(row.w_d)], noise)


def check_one_source(**sources) -> None:
    """Raises where more than one source of noise is given."""
    named = [name for name, source in sources.items() if source is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} were given: name one source of noise")


def _check_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got {value.layout}: use {name}.to_dense()")


def _check_like(name: str, value, x: Tensor) -> None:
    _check_tensor(name, value)
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}: use {name}.to(x.device)")


def _check_shard(x: Tensor, seed, global_shape, global_start) -> None:
    if global_shape is None and global_start is None:
        if x.dim() and math.prod(x.shape[1:]) > MAX_POSITIONS:
            raise ValueError(f"x must have at most 2^42 elements a sample, got {math.prod(x.shape[1:])}")
        return
    if global_shape is None or global_start is None:
        raise ValueError("global_shape and global_start must be given together: the sample's shape and where x starts in it")
    if seed is None:
        raise ValueError("global_shape needs seed=: only the portable stream can be drawn shard by shard")
    for name, value in [("global_shape", global_shape), ("global_start", global_start)]:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, int) for v in value):
            raise TypeError(f"{name} must be a list or tuple of whole numbers, got {value!r}")
        if len(value) != x.dim() - 1:
            raise ValueError(f"{name} must have the {x.dim() - 1} dimensions of one sample of x, got {len(value)}")
    for d, (whole, start, size) in enumerate(zip(global_shape, global_start, x.shape[1:], strict=True)):
        if not 0 <= start <= whole - size:
            raise ValueError(
                f"global_start must leave x inside global_shape: in dimension {d} of the sample x has {size} from {start}, "
                f"the whole has {whole}"
            )
    if math.prod(global_shape) > MAX_POSITIONS:
        raise ValueError(f"global_shape must have at most 2^42 elements, got {math.prod(global_shape)}")


def _check_out(out, x: Tensor, history, noise) -> None:
    _check_like("out", out, x)
    if out.dtype != x.dtype:
        raise TypeError(f"out must have the dtype of x, {x.dtype}, got {out.dtype}")
    inputs = [
        ("x", x),
        *((f"history[{j}]", d) for j, d in enumerate(history)),
        *([("noise", noise)] if noise is not None else []),
    ]
    if torch.is_grad_enabled() and any(tensor.requires_grad for _, tensor in [*inputs, ("out", out)]):
        raise ValueError("out must not be given where a gradient is required: use the returned tensor, or torch.no_grad()")
    if _overlaps_itself(out):
        raise ValueError("out must not overlap itself: it has several elements at one address, use out.contiguous()")
    for name, tensor in inputs:
        same = tensor.data_ptr() == out.data_ptr() and tensor.stride() == out.stride() and tensor.dtype == out.dtype
        if not same and _overlap(out, tensor):
            raise ValueError(f"out overlaps {name} partly: give {name} itself or memory of its own")


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """The address range that a tensor's elements lie in."""
    if tensor.numel() == 0:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _marked(tensor: Tensor, start: int, end: int) -> Tensor:
    """Which bytes of [start, end) the elements of a tensor cover."""
    marks = torch.zeros(end - start, dtype=torch.bool, device="cpu")
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    marks.as_strided([*tensor.shape, size], [*strides, 1], tensor.data_ptr() - start).fill_(True)
    return marks


def _overlaps_itself(tensor: Tensor) -> bool:
    sizes = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    reach = 0
    for stride, size in sizes:
        if stride <= reach:
            return int(_marked(tensor, *_bytes(tensor)).sum()) != tensor.numel() * tensor.element_size()
        reach += stride * (size - 1)
    return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    (a_start, a_end), (b_start, b_end) = _bytes(a), _bytes(b)
    if a_end <= b_start or b_end <= a_start:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    start, end = min(a_start, b_start), max(a_end, b_end)
    return bool((_marked(a, start, end) & _marked(b, start, end)).any())
