"""The pages: every snippet runs as it stands, links lead somewhere, commands exist, and public names say what a user needs."""

import functools
import importlib
import inspect
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_comfyui import comfyui  # noqa: F401, a fixture

import ersde_fast
from ersde_fast import noise_scaler, predictions
from ersde_fast.backends import BACKENDS
from ersde_fast.schedules import flow_sigmas, karras_sigmas
from samplers import k_diffusion

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()


def denoise(x, sigma, **extra_args):
    """The exact denoiser of standard normal data."""
    return x / (1 + sigma.reshape(-1, *[1] * (x.dim() - 1)) ** 2).to(x.dtype)


def a_run(**plan):
    """What a page's reader has: a plan, a sample [batch, ...], and the predictions before it."""
    plan = ersde_fast.er_sde_plan(**plan)
    x = plan.sigmas[0].item() * torch.randn(4, 3, 8, 8)
    return {
        "plan": plan,
        "i": 2,
        "x": x,
        "history": [denoise(x, plan.sigmas[:1])] * 3,
        "torch": torch,
        "ersde_fast": ersde_fast,
    }


def composition():
    given = a_run(sigmas=flow_sigmas(6), process="flow", order=3)
    output = torch.randn_like(given["x"])
    plans = [ersde_fast.er_sde_plan(karras_sigmas(n)) for n in (6, 4)]
    stacked = {"plan_a": plans[0], "plan_b": plans[1], "plan_index": torch.tensor([0, 1, 1, 0]), "step_index": torch.arange(4)}
    seeds = torch.tensor([[1, 0], [1, 1], [2, 0], [3, 0]])
    given |= {"output": output, "unconditional": output / 2, "velocity": output, "seeds": seeds, "model": denoise}
    given |= {"x_next": given["x"], "sigmas": flow_sigmas(6), "other_sigmas": flow_sigmas(6, 3.0)}
    return given | stacked | {"er_sde_plan": ersde_fast.er_sde_plan}


def integrations():
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    unet = UNet2DModel(8, **blocks, layers_per_block=1, norm_num_groups=4)

    class Pipeline(DDPMPipeline):
        def __call__(self, prompt, **options):
            return super().__call__(**options)

    k_diffusion()
    given = a_run(sigmas=karras_sigmas(3))
    loaded = SimpleNamespace(from_pretrained=lambda name: Pipeline(unet, DDPMScheduler()))
    given |= {"DiffusionPipeline": loaded, "callback": lambda said: None, "cond": None, "alphas": torch.linspace(0.1, 1, 4)}
    given |= {"sigmas": torch.sqrt(1 - torch.linspace(0.1, 1, 4) ** 2), "times": torch.linspace(1, 0, 4)}
    given["brownian_tree"] = lambda sigma, sigma_next: torch.randn(4, 3, 8, 8)
    return given | {"sample_er_sde": ersde_fast.sample_er_sde, "model": denoise}


def serving():
    given = a_run(sigmas=karras_sigmas(3))
    output, rounds = torch.randn(4, 3, 8, 8), iter(range(3))

    def admit():
        return ["request"] * 4

    def finish(done):
        if next(rounds) == 2:
            given["running"].clear()

    given |= {"plans": [given["plan"]], "running": ["request"], "admit": admit, "finish": finish, "last_step": 2}
    given |= {"indices": lambda running: (torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 2, 0])), "conditions": None}
    given |= {"sigma_of": lambda plan, step: given["plan"].sigmas[step], "model": lambda x, sigma, conditions: output}
    return given | {"unconditional": output, "scales": torch.full((4,), 2.0, dtype=torch.float64), "seeds": [1, 2, 3, 4]}


def calibration():
    """The network of a pipeline is exact for standard normal data, and reads no prompt."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def unet(x, timestep, prompts):
        assert len(prompts) == len(x)
        return SimpleNamespace(sample=x * (1 - scheduler.alphas_cumprod[round(timestep)]).sqrt())

    pipe = SimpleNamespace(unet=unet, scheduler=scheduler)
    given = {"pipe": pipe, "prompts": torch.zeros(16, 3, 8), "without": torch.zeros(1, 3, 8)}
    return given | {"model": denoise, "extra_args": {"scale": 1.0}}


GIVEN = {"choosing.md": lambda: a_run(sigmas=karras_sigmas(3)) | {"model": denoise}, "composition.md": composition}
GIVEN |= {"integrations.md": integrations, "serving.md": serving}
GIVEN |= {"calibration.md": calibration}


@pytest.fixture
def as_they_were(monkeypatch, tmp_path):
    """A folder of its own and one process; undoes what a page adds to the lists and tables of the package."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    for table in (predictions.PREDICTION_TYPES, noise_scaler.NOISE_SCALERS):
        for name in table:
            monkeypatch.setitem(table, name, table[name])
    kept = [(table, dict(table)) for table in (predictions.PREDICTION_TYPES, noise_scaler.NOISE_SCALERS)], list(BACKENDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # the page is about tracing
    yield
    for table, before in kept[0]:
        table.clear()
        table.update(before)
    BACKENDS[:] = kept[1]


def snippets(page):
    """Each python block of a page, on the lines that it has there."""
    text = page.read_text()
    return [
        "\n" * text[: found.start(1)].count("\n") + found[1]
        for found in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if snippets(page) and page.name != "errors.md"], ids=lambda page: page.name
)
def test_snippets_run(page, as_they_were):
    torch.manual_seed(0)
    given, scope = GIVEN.get(page.name, dict)(), {}
    for code in snippets(page):
        scope |= given
        exec(compile(code.replace('"cuda"', '"cpu"'), str(page), "exec"), scope)  # where the page's reader has a GPU


MISTAKE = re.compile(r"^```python\n(.*?)^```\n+(?:```\n(\w+): (.*?)\n```)?", re.M | re.S)
MISTAKES = MISTAKE.findall((ROOT / "docs" / "errors.md").read_text())


def test_there_are_mistakes():
    assert sum(bool(error) for _, error, _ in MISTAKES) >= 20


@pytest.fixture
def node(request):
    """The node of ComfyUI, its settings as a call."""
    defaults = {"solver_type": "ER-SDE", "order": 3, "eta": 1.0, "s_noise": 1.0, "method": "by cfg", "node_scale": 10.0}
    defaults |= {"noise": "ComfyUI's (torch)", "compatible": False}
    return lambda **settings: request.getfixturevalue("comfyui").SamplerERSDEFast().get_sampler(**defaults | settings)


@pytest.mark.parametrize(
    "place", [k for k, (_, error, _) in enumerate(MISTAKES) if error], ids=lambda k: MISTAKES[k][0].splitlines()[-1]
)
def test_mistake(place, as_they_were, node):
    scope = {"node": node}
    for code, error, _ in MISTAKES[:place]:
        if not error:  # what the page's examples have before them
            exec(code, scope)
    code, error, message = MISTAKES[place]
    with pytest.raises(Exception) as raised:
        exec(code, scope)
    told, cut = f"{type(raised.value).__name__}: {raised.value}", message.endswith(" ...")
    expected = f"{error}: {message.removesuffix(' ...')}"
    assert told == expected or (cut and told.startswith(expected))


def test_readmes_loop_is_the_samplers(as_they_were):
    scope = {}
    for code in snippets(ROOT / "README.md"):
        exec(code, scope)
    assert torch.equal(scope["x"], scope["images"])


CELLS = re.findall(
    r"`((?:from |[\w.]+(?:, \w+)*(?: = [\w.]+)?\()[^`]*)`",
    "\n".join(re.findall(r"^\|.*", (ROOT / "README.md").read_text(), re.M)),
)


def test_there_are_cells():
    assert len(CELLS) >= 6


@pytest.mark.parametrize("code", CELLS)
def test_readmes_table_runs(code, as_they_were):
    """What one writes instead of what one uses."""
    scheduler = pytest.importorskip("ersde_fast.integrations.diffusers").ERSDEScheduler
    scope = composition() | {"pipe": SimpleNamespace(scheduler=scheduler()), "ERSDEScheduler": scheduler}
    scope |= {"tree": lambda sigma, sigma_next: torch.randn(4, 3, 8, 8), "shape": (3, 8, 8), "out_dir": "out"}
    scope |= {name: getattr(ersde_fast, name) for name in ("calibrate_plan", "fast_step", "sample_er_sde", "stack_plans")}
    scope |= {"plans": [scope["plan_a"], scope["plan_b"]], "karras_sigmas": karras_sigmas}
    if "generate" in code:
        scope["seeds"] = range(2)
    if "calibrate" in code:
        scope["x"] = 80 * scope["x"]  # the first of the cell's levels
    exec(code, scope)


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "mkdocs.yml", "-d", tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert built.returncode == 0, built.stderr
    assert {"index.html", "api.html", "errors.html"} <= {path.name for path in tmp_path.iterdir()}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 800


def anchors(page):
    """The names of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+)%?:", MAKEFILE, re.M))
    assert {name for name in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.M)} <= targets
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, module
    for script in re.findall(r"(?:python|pytest) ((?:bench|examples|tests)/[\w./]*)", text):
        assert (ROOT / script).exists(), script


API = re.findall(r"^::: ([\w.]+)(?:\n    options:\n      members: \[(.*)\])?", (ROOT / "docs" / "api.md").read_text(), re.M)
MODULES = ("ersde_fast.schedules", "ersde_fast.rl", "ersde_fast.graph", "ersde_fast.distributed")


def public_names():
    """Each name of the page, and what it is; ComfyUI's module needs ComfyUI."""
    for name, members in API:
        for path in [name, *(f"{name}.{member}" for member in members.split(", ") if member)]:
            if ".comfyui." not in path:
                parts = path.split(".")
                module = max(k for k in range(len(parts)) if is_module(".".join(parts[: k + 1]))) + 1
                found = importlib.import_module(".".join(parts[:module]))
                for part in parts[module:]:
                    found = getattr(found, part)
                yield path, found


def is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


PUBLIC = dict(public_names())


def test_every_public_name_is_on_the_page():
    names = {f"ersde_fast.{name}" for name in ersde_fast.__all__}
    for module in MODULES:
        found = importlib.import_module(module)
        own = getattr(found, "__all__", None) or [
            name for name, value in vars(found).items() if getattr(value, "__module__", "") == module and name[0] != "_"
        ]
        names |= {f"{module}.{name}" for name in own}
    names -= {"ersde_fast.schedules.place_sigmas", "ersde_fast.graph.step_in_ring", "ersde_fast.schedules.Numbers"}
    assert names <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    """Every argument by its name, shapes of tensors, what is returned, what is raised, and where it comes from."""
    documented, text = PUBLIC[name], inspect.getdoc(PUBLIC[name]) or ""
    assert text
    if inspect.ismodule(documented) or name.endswith("__call__") or ".ERSDEScheduler." in name:  # whose methods are diffusers'
        return
    belongs_to_a_class = inspect.isclass(PUBLIC.get(name.rpartition(".")[0]))
    assert belongs_to_a_class or re.search(r"\bSource: \S", text), "source"
    if inspect.isclass(documented):
        return
    signature = inspect.signature(documented)
    for argument in signature.parameters.values():
        assert argument.name in ("self", "args", "kwargs") or re.search(rf"\b{argument.name}\b", text), argument.name
    assert "Tensor" not in str(signature) or "[" in text, "shapes"
    assert signature.return_annotation in (None, "None", inspect.Signature.empty) or re.match(
        "The |.*^Returns:", text, re.M | re.S
    ), "returns"
    assert re.search("^Raises:", text, re.M), "errors"
