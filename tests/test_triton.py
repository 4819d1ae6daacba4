"""The Triton kernel without a GPU: interpreted on the CPU, and compiled ahead of time for NVIDIA and AMD GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ersde_fast.kernels import er_sde_step as kernel

ROOT = Path(__file__).resolve().parent.parent
TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64)]


def test_interpreted():
    """In its own process: the interpreter is chosen when Triton is imported, and excludes compiling."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "triton_cases.py"]
    result = subprocess.run(tests, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("source", [kernel.NO_NOISE, kernel.PORTABLE, kernel.TORCH], ids=["no noise", "portable", "torch"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [-1, 2], ids=["predictions", "model output"])
def test_compiles(target, source, dtype, kind):
    """For each GPU; on NVIDIA's every access of the tensors is 128 bits wide, and nothing goes through shared memory."""
    if target.backend == "hip" and source.value == kernel.TORCH.value:
        return  # torch draws otherwise there, and the step never asks for it
    names = [p.name for p in kernel.er_sde_step.params]
    types = {p.name: p.annotation_type for p in kernel.er_sde_step.params}
    tensors = ["x", "h0", "h1", "h2", "h3", "h4", "guide", "noise", "out", "denoised"]
    types |= dict.fromkeys(tensors, f"*{dtype}") | {"seeds": "*i64", "table": "*fp64", "scales": "*fp64", "size": "i64"}
    types |= {"samples": "i32", "plan_index": "*i64", "step_index": "*i64"}
    constants = dict(
        ORDER=3, GIVEN=3, INDEXED=0 if kind < 0 else 3, PREDICTS=kind >= 0, GUIDED=0 if kind < 0 else 2, HAS_NOISE=False
    )
    block, turns = kernel.blocks_of(source.value, {"fp32": 4, "bf16": 2}[dtype], 1, kernel.LARGE)
    constants |= dict(
        SOURCE=source.value, HAS_SEEDS=kind >= 0, WIDE=False, BLOCK=block, TURNS=turns, NVIDIA=target.backend == "cuda"
    )
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in [*tensors, "size", "torch_threads"]}
    code = ASTSource(fn=kernel.er_sde_step, signature={n: types[n] for n in names}, constexprs=constants, attrs=aligned)
    compiled = triton.compile(code, target=target, options=kernel.compile_options(block))
    reads, writes = (4, 1) if kind < 0 else (5, 2)
    if target.backend == "hip":
        loads = [line for line in compiled.asm["amdgcn"].splitlines() if "global_load" in line and "dwordx" in line]
        assert len(loads) >= reads  # 64 lanes of a wave: 16 or, for bfloat16, 8 bytes each
    else:
        lines = compiled.asm["ptx"].splitlines()
        loads = [
            line for line in lines if "ld.global" in line and "b64" not in line
        ]  # the table and the seeds are single numbers
        stores = [line for line in lines if "st.global" in line]
        assert len(loads) >= reads and len(stores) >= writes and all(".v4" in line for line in loads + stores)
        assert "fma.rn.f32" in compiled.asm["ptx"] and compiled.metadata.shared == 0
