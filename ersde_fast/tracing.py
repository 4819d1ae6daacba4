"""Who else sees what torch runs, tracers, modes and transforms, and which tensors hold numbers that Python may read. Asked here alone."""

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, _dispatch_tls_is_dispatch_key_included, _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

PRE_DISPATCH = DispatchKey.PreDispatch  # of make_fx and export before autograd; an attribute costs as much as the question


def is_traced() -> bool:
    """Whether a mode of Python, which make_fx and fake tensors are too, or TorchScript wants to see the operators of this thread.

    The extension's own question is is_traced of csrc/torch_tensors.h. What torch.compile reads is asked by is_dynamo_compiling.
    """
    return _len_torch_dispatch_stack() > 0 or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH) or _is_tracing()


def is_unwatched() -> bool:
    """Whether none of these, no transform of torch.func and no derivative forwards is at work: a kernel need not look at its tensors."""
    return not is_traced() and forward_ad._current_level < 0 and peek_interpreter_stack() is None


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func holds it, and its numbers are another tensor's."""
    return is_functorch_wrapped_tensor(tensor)


def is_stand_in(tensor: Tensor) -> bool:
    """Whether it stands for a plain tensor while torch traces, in a mode or after it."""
    return type(tensor).__name__ in ("FakeTensor", "FunctionalTensor")


def has_values(tensor: Tensor) -> bool:
    """Whether Python may look at the numbers: they are on the host, and no transform or tracer stands before them."""
    if torch.compiler.is_dynamo_compiling():
        return False
    plain = tensor.is_cpu and type(tensor) is Tensor and not is_wrapped(tensor)
    return plain and not (is_traced() and _is_followed(tensor))


def _is_followed(tensor: Tensor) -> bool:
    """Whether the tracer at work follows a tensor that holds numbers, which in its trace are none: what is read now would stay in it."""
    if _is_tracing():
        return True
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot  # a tracer has imported it

    mode = get_proxy_mode()
    held = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    return held is not None and held.constant is None  # what was made within the trace of numbers alone is a constant of it


def numbers_of(tensor: Tensor, index=...) -> Any:
    """Its values, or those at an index, as numbers and lists of them: a tracer would take the look-up down, and give symbols."""
    with without_tracers():
        return tensor[index].tolist()


@contextmanager
def without_tracers():
    """No tracer, transform or inference mode may come between: for what a plan keeps, which later steps have too, and for numbers that
    the host knows."""
    with torch.inference_mode(False), _disable_current_modes(), torch._C._DisableFuncTorch():
        yield
