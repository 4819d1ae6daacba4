"""The study of docs/quality.md: every sampler on every problem, a cell at a time, kept as they are measured.

make quality                                 # measures what bench/quality/results.json lacks, writes tables and figures
python bench/quality/study.py --quick        # a few cells, kept nowhere
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from ersde_fast.integrations.edm import karras_sigmas
from problems import (
    data_std,
    digits_mixture,
    digits_themselves,
    frechet,
    gaussian_frechet,
    sliced_wasserstein,
    spectra,
)  # fmt: skip
from samplers import RIVALS, STOCHASTIC, contenders, ours

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
EVALUATIONS = (5, 6, 8, 10, 15, 20, 35, 50)
SEEDS = (0, 1, 2)
SAMPLES = 4000
PROBLEMS = {"mixture": digits_mixture, "digits": digits_themselves}
ENDS = (0.01, 40.0)
ZERO = torch.zeros(1, dtype=torch.float64)
SPACINGS = {  # of the levels of the mixture, beside Karras et al.'s
    "even in log-SNR": lambda n: torch.cat(
        [torch.logspace(*(math.log10(e) for e in ENDS[::-1]), n, dtype=torch.float64), ZERO]
    ),
    "Karras, rho 3": lambda n: karras_sigmas(n, *ENDS, rho=3.0),
}
SOME = [
    "published, order 3", "newton 3", "newton 2, c = 10 std", "newton 3, c = 10 std", "newton 4, c = 15 std", "newton 3, c = 10 std, ode",
    "newton 3, c = 10 std, sde", *RIVALS,
]  # fmt: skip
FLOOR = "exact samples"


def steps_of(run, evaluations: int) -> int:
    """Steps that a sampler makes with so many evaluations of the model; those with two a step make one at the last."""
    return math.ceil(evaluations / getattr(run, "evaluations", 1))


def measure(problem, run, evaluations: int, seed: int, samples: int, spacing=lambda n: karras_sigmas(n, *ENDS)) -> dict:
    """One cell: the distances of the samples' moments and of their projections to the exact ones."""
    g = torch.Generator().manual_seed(1000 + seed)
    shape = (samples, len(problem.mean))
    draw = lambda i=None: torch.randn(shape, dtype=torch.float64, generator=g)  # noqa: E731
    if run is None:
        x = problem.sample(samples, g)
    else:
        sigmas = spacing(steps_of(run, evaluations))
        x = run(problem.denoise, sigmas[0] * draw(), sigmas, draw)
    if not x.isfinite().all():
        return {"frechet": float("inf"), "wasserstein": float("inf")}
    exact = problem.sample(samples, torch.Generator().manual_seed(5000 + seed))
    return {"frechet": frechet(x, problem.mean, problem.covariance), "wasserstein": sliced_wasserstein(x, exact)}


def cells():
    """(key, function that measures it) of the whole study."""
    for name, make in PROBLEMS.items():
        problem = make()
        samplers = {FLOOR: None} | contenders(data_std(problem))
        for sampler, run in samplers.items():
            if name == "digits" and sampler != FLOOR and sampler not in SOME:
                continue
            for n in EVALUATIONS if run is not None else EVALUATIONS[:1]:
                for seed in SEEDS:
                    key = f"{name} | {sampler} | {n} | {seed}"
                    yield key, lambda p=problem, r=run, n=n, s=seed: measure(p, r, n, s, SAMPLES)
    problem = digits_mixture()
    samplers = contenders(data_std(problem))
    for spacing, levels in SPACINGS.items():
        for sampler in SOME:
            for n in (8, 10, 20):
                for seed in SEEDS:
                    key = f"mixture, {spacing} | {sampler} | {n} | {seed}"
                    yield key, lambda r=samplers[sampler], n=n, s=seed, v=levels: measure(problem, r, n, s, SAMPLES, v)
    for spectrum, eigenvalues in spectra().items():
        samplers = {
            "published, order 3": ours(integration_points=200),
            "taylor 3, exact": ours(),
            "newton 3": ours(method="newton"),
        }
        samplers |= {f"newton 3, c = {c}": ours(method="newton", node_scale=float(c)) for c in (4, 8, 16, 32)}
        samplers |= {name: RIVALS[name] for name in ("SDE-DPM-Solver++ 2M", "DPM-Solver++ 2M")}
        for sampler, run in samplers.items():
            for n in EVALUATIONS:
                sigmas = karras_sigmas(n)
                key = f"spectrum {spectrum} | {sampler} | {n} | 0"
                yield key, lambda r=run, s=sigmas, e=eigenvalues: {"frechet": gaussian_frechet(r, s, e)}


def kept() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(results: dict) -> None:
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
    partial.replace(RESULTS)


def over_seeds(results: dict, problem: str, sampler: str, evaluations: int, what="frechet") -> tuple[float, float]:
    """Mean and spread (largest less smallest, halved) of a cell over the seeds."""
    values = [results[f"{problem} | {sampler} | {evaluations} | {seed}"][what] for seed in SEEDS]
    return statistics.mean(values), (max(values) - min(values)) / 2


def floor(results: dict, problem: str, what="frechet") -> float:
    return over_seeds(results, problem, FLOOR, EVALUATIONS[0], what)[0]


def table(results: dict, problem: str, what="frechet") -> str:
    """Markdown: samplers by evaluations, mean of three seeds and the spread."""
    samplers = list(dict.fromkeys(key.split(" | ")[1] for key in results if key.startswith(f"{problem} | ")))
    order = [FLOOR, *contenders(1.0)]
    lines = [f"| {problem}, {what} | {' | '.join(map(str, EVALUATIONS))} |", "|---" * (len(EVALUATIONS) + 1) + "|"]
    for sampler in sorted((s for s in samplers if s != FLOOR), key=order.index):
        cells = [over_seeds(results, problem, sampler, n, what) for n in EVALUATIONS]
        lines.append(f"| {sampler} | {' | '.join(number(mean, spread) for mean, spread in cells)} |")
    return "\n".join([*lines, f"| exact samples | {floor(results, problem, what):.3f} |" + " |" * (len(EVALUATIONS) - 1)])


def number(mean: float, spread: float) -> str:
    if not mean < 100:
        return "diverges"
    return f"{mean:.2f}" if mean >= 1 else f"{mean:.3f} ({spread:.3f})"


def excess_table(results: dict) -> str:
    """Markdown: the excess over the floor as a share of the published rule's."""
    chosen = [
        "newton 3",
        "newton 2, c = 10 std",
        "newton 3, c = 5 std",
        "newton 3, c = 10 std",
        "newton 3, c = 15 std",
        "newton 4, c = 15 std",
    ]
    chosen += ["newton 3, c = 10 std, ode", "DPM-Solver++ 2M", "SDE-DPM-Solver++ 2M"]
    few = (5, 6, 8, 10, 15)
    lines = [f"| excess, as a share of the published rule's | {' | '.join(map(str, few))} |", "|---" * (len(few) + 1) + "|"]
    least = floor(results, "mixture")
    for sampler in chosen:
        shares = []
        for n in few:
            excess = over_seeds(results, "mixture", sampler, n)[0] - least
            shares.append(f"{excess / (over_seeds(results, 'mixture', 'published, order 3', n)[0] - least):.2f}")
        lines.append(f"| {sampler} | {' | '.join(shares)} |")
    return "\n".join(lines)


def spacing_table(results: dict) -> str:
    """Markdown: Frechet distance on the mixture at 8, 10 and 20 evaluations, by the spacing of the levels."""
    problems = ["mixture", *(f"mixture, {spacing}" for spacing in SPACINGS)]
    lines = [
        f"| evaluations | {' | '.join(f'Karras, rho 7: {n}' if p == 'mixture' else f'{p[9:]}: {n}' for p in problems for n in (8, 10, 20))} |"
    ]
    lines.append("|---" * (3 * len(problems) + 1) + "|")
    for sampler in SOME:
        values = [number(*over_seeds(results, problem, sampler, n)) for problem in problems for n in (8, 10, 20)]
        lines.append(f"| {sampler} | {' | '.join(values)} |")
    return "\n".join(lines)


def spectrum_table(results: dict) -> str:
    """Markdown: squared Frechet distance a dimension for Gaussian data, no sampling error."""
    lines = [f"| spectrum | sampler | {' | '.join(map(str, EVALUATIONS))} |", "|---" * (len(EVALUATIONS) + 2) + "|"]
    for key in results:
        problem, sampler, n, _ = key.split(" | ")
        if problem.startswith("spectrum") and int(n) == EVALUATIONS[0]:
            values = [results[f"{problem} | {sampler} | {m} | 0"]["frechet"] for m in EVALUATIONS]
            lines.append(f"| {problem.removeprefix('spectrum ')} | {sampler} | {' | '.join(f'{v:.1e}' for v in values)} |")
    return "\n".join(lines)


def figures(results: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = ["published, order 3", "newton 3", "newton 3, c = 10 std", "newton 3, c = 10 std, ode", *RIVALS]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for panel, problem in zip(panels, PROBLEMS, strict=True):
        panel.set_prop_cycle(color=plt.colormaps["tab20"].colors)
        for sampler in drawn:
            values = [over_seeds(results, problem, sampler, n)[0] for n in EVALUATIONS]
            style = "-" if sampler not in RIVALS else "--" if sampler in STOCHASTIC else ":"
            panel.plot(EVALUATIONS, values, style, marker="o" if sampler not in RIVALS else ".", label=sampler)
        panel.axhline(floor(results, problem), color="black", linewidth=0.8, label="exact samples")
        panel.set(xscale="log", yscale="log", title=problem, xlabel="evaluations", ylim=(0.02, 20))
        panel.set_xticks(EVALUATIONS, EVALUATIONS)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("squared Frechet distance")
    panels[1].legend(fontsize=7)
    figure.savefig(folder / "quality.png", dpi=110)
    plt.close(figure)

    figure, panel = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for n in (5, 6, 8, 10, 15):
        scales = (5, 10, 15, 30)
        values = [over_seeds(results, "mixture", f"newton 3, c = {c} std", n)[0] for c in scales]
        panel.plot(scales, values, marker="o", label=f"{n} evaluations")
        panel.axhline(
            over_seeds(results, "mixture", "newton 3", n)[0], color=panel.lines[-1].get_color(), linestyle=":", linewidth=1
        )
    panel.set(
        xscale="log", yscale="log", xlabel="node_scale / standard deviation of the data", ylabel="squared Frechet distance"
    )
    panel.set_xticks((5, 10, 15, 30), (5, 10, 15, 30))
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7, title="dotted: node_scale = inf", title_fontsize=7)
    figure.savefig(folder / "node_scale.png", dpi=110)
    plt.close(figure)


def write(results: dict, page: Path) -> None:
    """The tables, between their markers in the page."""
    text = page.read_text()
    tables = {
        "mixture": table(results, "mixture"), "excess": excess_table(results), "digits": table(results, "digits"),
        "wasserstein": table(results, "mixture", "wasserstein"), "spectra": spectrum_table(results),
        "spacings": spacing_table(results),
    }  # fmt: skip
    for name, made in tables.items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        text = f"{before}<!-- {name} -->\n{made}\n<!-- end -->\n{rest.split('<!-- end -->' + chr(10), 1)[1]}"
    page.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells with few samples, kept nowhere")
    args = parser.parse_args()
    if args.quick:
        problem = digits_mixture()
        samplers = contenders(data_std(problem))
        for name in ("published, order 3", "newton 3, c = 10 std", *RIVALS):
            got = measure(problem, samplers[name], 8, 0, 1000)
            print(f"{name:28} frechet {got['frechet']:8.3f}  wasserstein {got['wasserstein']:.3f}")
        return
    results = kept()
    missing = [(key, cell) for key, cell in cells() if key not in results]
    for count, (key, cell) in enumerate(tqdm(missing, unit="cell"), 1):
        results[key] = cell()
        if count % 24 == 0 or count == len(missing):
            keep(results)
    figures(results, ROOT / "docs")
    write(results, ROOT / "docs" / "quality.md")


if __name__ == "__main__":
    main()
