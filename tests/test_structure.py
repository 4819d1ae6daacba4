"""The shape of the code: arguments that a function takes, lines that a file has, and one module that holds the extension."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [*(ROOT / "ersde_fast").rglob("*.py"), *(ROOT / "csrc").iterdir(), *(ROOT / "kernels").glob("*.py")]
MODULES = [path for path in FILES if path.suffix == ".py"]
# Users' own calls by keyword, what answers them at once, the interfaces of other tools, and functions of a kernel's language.
MANY = {
    "fast_step", "reference_step", "step_log_prob", "er_sde_plan", "calibrate_plan", "sample_er_sde", "generate",
    "er_sde_sampler", "sample_er_sde_fast", "get_sampler", "er_sde_step", "combine_and_store",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    if path.suffix != ".so":
        assert len(path.read_text().splitlines()) <= 600


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_take_few_arguments(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            not isinstance(node, ast.FunctionDef)
            or node.name in MANY
            or (path.name, node.name)
            in {("diffusers.py", "__init__"), ("library.py", "step"), ("triton.py", "step")}  # called as the extension's
        ):
            continue
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        assert len([name for name in names if name not in ("self", "cls")]) <= 8, node.name


def test_one_module_holds_the_extension():
    holding = [path.relative_to(ROOT) for path in MODULES if "ersde_fast._C" in path.read_text()]
    assert holding == [Path("ersde_fast/backends/extension.py")]
