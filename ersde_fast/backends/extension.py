"""The extension `_C`, built against the torch that is installed; or None, and why there is none."""

import importlib
from types import ModuleType

import torch  # whose libraries the extension links with

try:
    from .._build_info import REASONS, TORCH
except ImportError:
    REASONS, TORCH = {}, None

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps . in the folder of ersde-fast"


def load() -> tuple[ModuleType | None, str | None]:
    """The extension and None, or None and the reason, which names the remedy."""
    if "cpu" in REASONS:
        return None, REASONS["cpu"]
    built, here = (str(version).split(".")[:2] for version in (TORCH, torch.__version__))
    if TORCH is not None and built != here:  # what a C++ class looks like may differ between them
        return None, f"ersde-fast was built against torch {TORCH}, and this is torch {torch.__version__}: {REINSTALL}"
    try:
        return importlib.import_module("ersde_fast._C"), None
    except ModuleNotFoundError:
        return None, f"the extension was not built, or for another Python: {REINSTALL}"
    except ImportError as error:
        return None, f"the extension does not load beside torch {torch.__version__} ({error}): {REINSTALL}"


_C, WHY_NOT = load()
