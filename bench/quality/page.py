"""The tables and pictures of docs/quality.md, from the cells that the study has kept."""

import math
import statistics
from pathlib import Path

import cells
from samplers import AT_THE_END, BY_LEVEL, RIVALS, SCALER_FAMILIES, SCALERS, STOCHASTIC, contenders

OURS = "newton 3, c = 10 std"
PUBLISHED = "published, order 3"


def over_seeds(results: dict, problem: str, sampler: str, evaluations: int, what="frechet") -> tuple[float, float] | None:
    """Mean and spread (largest less smallest, halved) of a cell over the seeds; None where it was not measured."""
    values = [results.get(f"{problem} | {sampler} | {evaluations} | {seed}", {}).get(what) for seed in cells.SEEDS]
    return None if None in values else (statistics.mean(values), (max(values) - min(values)) / 2)


def floor(results: dict, problem: str, what="frechet") -> float:
    """The same of exact samples, or of the network's own limit."""
    problem = problem.partition(",")[0]
    return over_seeds(results, problem, cells.FLOOR, cells.LIMIT_STEPS if "network" in problem else cells.EVALUATIONS[0], what)[
        0
    ]


def number(cell: tuple[float, float] | None) -> str:
    if cell is None:
        return ""
    mean, spread = cell
    if not mean < 100:
        return "diverges"
    return f"{mean:.2f}" if mean >= 1 else f"{mean:.3f} ({spread:.3f})"


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grid(results: dict, corner: str, columns: list[tuple], samplers: list[str], what="frechet") -> str:
    """Samplers by columns (title, problem, evaluations); samplers without any cell are left out."""
    rows = [
        [sampler, *(number(over_seeds(results, problem, sampler, n, what)) for _, problem, n in columns)]
        for sampler in samplers
    ]
    return markdown([corner, *(str(title) for title, _, _ in columns)], [row for row in rows if any(row[1:])])


def by_evaluations(results: dict, problem: str, what="frechet", evaluations=cells.EVALUATIONS, samplers=None) -> str:
    samplers = [s for s in contenders(1.0) if s not in cells.IN_PART] if samplers is None else samplers
    made = grid(results, f"{problem}, {what}", [(n, problem, n) for n in evaluations], samplers, what)
    return f"{made}\n| exact samples | {floor(results, problem, what):.3f} |" + " |" * (len(evaluations) - 1)


def shares(results: dict, problem: str, samplers: list[str], evaluations: tuple, of: str, what="frechet") -> str:
    """Excess over the floor, as a share of the published rule's on the problem `of`."""
    least = floor(results, problem, what)
    excess = lambda name, sampler, n: over_seeds(results, name, sampler, n, what)[0] - least  # noqa: E731
    rows = [[s, *(f"{excess(problem, s, n) / excess(of, PUBLISHED, n):.2f}" for n in evaluations)] for s in samplers]
    title = f"{problem}{' to the data' if what == 'data' else ''}: share of the published rule's excess"
    return markdown([title, *map(str, evaluations)], rows)


def spacings(results: dict) -> str:
    columns = [(f"Karras, rho 7: {n}", "mixture", n) for n in (8, 10, 20)]
    columns += [(f"{spacing}: {n}", f"mixture, {spacing}", n) for spacing in cells.SPACINGS for n in (8, 10, 20)]
    return grid(results, "evaluations", columns, cells.SOME)


def placed(results: dict) -> str:
    problems = ("mixture", "digits", *cells.NETWORKS)
    columns = [(f"{p}: {n}", p + placed, n) for p in problems for n in (6, 8, 10) for placed in ("", ", placed")]
    return grid(results, "evaluations", [(f"{t}{', placed' * ('placed' in p)}", p, n) for t, p, n in columns], cells.PLACED)


def families(results: dict) -> str:
    columns = [(n, "mixture", n) for n in (5, 10, 20)]
    named = [f"{OURS}, {scaler}" for scaler in SCALERS if scaler != "sde_5"]
    return grid(results, "evaluations", columns, [*named, OURS, *SCALER_FAMILIES])


def ends(results: dict) -> str:
    columns = [(n, "mixture", n) for n in (8, 10, 20)] + [(f"network: {n}", "network", n) for n in (8, 10, 20)]
    plain = ["newton 3, c = 15 std", "newton 4, c = 15 std"]
    return grid(results, "evaluations", columns, [OURS, *AT_THE_END, *plain, *BY_LEVEL])


def spectra(results: dict) -> str:
    rows = []
    for key in sorted(results):
        problem, sampler, n, _ = key.split(" | ")
        if problem.startswith("spectrum") and int(n) == cells.EVALUATIONS[0]:
            values = [results[f"{problem} | {sampler} | {m} | 0"]["frechet"] for m in cells.EVALUATIONS]
            rows.append([problem.removeprefix("spectrum "), sampler, *(f"{v:.1e}" for v in values)])
    return markdown(["spectrum", "sampler", *map(str, cells.EVALUATIONS)], rows)


def convergence(results: dict) -> str:
    rows = []
    for sampler in cells.CLOSED_FORM:
        row = [sampler]
        for scaler in ("ode", "sde_5"):
            errors = [results[f"convergence, {scaler} | {sampler} | {n} | 0"]["error"] for n in cells.STEP_COUNTS]
            row += [f"{errors[1]:.1e}", f"{errors[-1]:.1e}", f"{math.log2(errors[-3] / errors[-2]):.1f}"]
        rows.append(row)
    what = [f"{scaler}: {column}" for scaler in ("ode", "sde_5") for column in ("20 steps", "160 steps", "slope, 40 to 80")]
    return markdown(["error of the variance", *what], rows)


def amplification(results: dict) -> str:
    rows = []
    for sampler in cells.CLOSED_FORM:
        measured = [results[f"amplification | {sampler} | {n} | 0"] for n in (8, 10, 20)]
        rows.append([sampler, *(f"{cell['all']:.2f}, {cell['high']:.3f}" for cell in measured)])
    return markdown(["all levels, those above sigma 10", "8", "10", "20"], rows)


def tables(results: dict) -> dict[str, str]:
    chosen = [
        "default",
        "newton 3",
        "newton 2, c = 10 std",
        "newton 3, c = 5 std",
        OURS,
        "newton 3, c = 15 std",
        "newton 4, c = 15 std",
    ]
    chosen += [f"{OURS}, ode", "DPM-Solver++ 2M", "SDE-DPM-Solver++ 2M"]
    network = [s for s in dict.fromkeys([*cells.ON_NETWORK, *RIVALS]) if s not in BY_LEVEL]
    few = (5, 6, 8, 10, 15, 20)
    made = {
        "mixture": by_evaluations(results, "mixture"), "wasserstein": by_evaluations(results, "mixture", "wasserstein"),
        "excess": shares(results, "mixture", chosen, (5, 6, 8, 10, 15), "mixture"), "digits": by_evaluations(results, "digits"),
        "spectra": spectra(results), "spacings": spacings(results), "families": families(results), "ends": ends(results),
        "convergence": convergence(results), "amplification": amplification(results),
    }  # fmt: skip
    if over_seeds(results, "network", "default", 8):
        for name in cells.NETWORKS:
            made |= {
                name: by_evaluations(results, name, "frechet", few, network),
                f"{name} data": by_evaluations(results, name, "data", few, network),
                f"{name} excess": shares(results, name, chosen, (5, 6, 8, 10, 15), name),
                f"{name} data excess": shares(results, name, chosen, (5, 6, 8, 10), name, "data"),
                f"placed {name} excess": shares(results, f"{name}, placed", cells.PLACED, (6, 8, 10), name),
            }
        made |= {
            "placed": placed(results),
            "placed excess": shares(results, "mixture, placed", cells.PLACED, (5, 6, 8, 10), "mixture"),
        }
    return made


def picture(results: dict, plt, names: tuple, evaluations: tuple, limits: tuple):
    """Distance against evaluations, one panel a problem."""
    drawn = [PUBLISHED, "newton 3", "default", OURS, f"{OURS}, ode", *RIVALS]
    figure, panels = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4.5), layout="constrained")
    for panel, problem in zip(panels, names, strict=True):
        panel.set_prop_cycle(color=plt.colormaps["tab20"].colors)
        for sampler in drawn:
            means = {n: cell[0] for n in evaluations if (cell := over_seeds(results, problem, sampler, n))}
            style = "-" if sampler not in RIVALS else "--" if sampler in STOCHASTIC else ":"
            panel.plot(list(means), list(means.values()), style, marker="o" if sampler not in RIVALS else ".", label=sampler)
        panel.axhline(floor(results, problem), color="black", linewidth=0.8, label="exact samples")
        panel.set(xscale="log", yscale="log", title=problem, xlabel="evaluations", ylim=limits)
        panel.set_xticks(evaluations, evaluations)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("squared Frechet distance")
    figure.legend(*panels[-1].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    return figure


def figures(results: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = {"quality.png": picture(results, plt, tuple(cells.PROBLEMS), cells.EVALUATIONS, (0.02, 20))}
    if over_seeds(results, "network", "default", 8):
        made["quality_network.png"] = picture(results, plt, cells.NETWORKS, (5, 6, 8, 10, 15, 20), (0.02, 10))

    figure, panel = plt.subplots(figsize=(5.5, 4), layout="constrained")
    scales = (5, 10, 15, 30)
    for n in (5, 6, 8, 10, 15):
        values = [over_seeds(results, "mixture", f"newton 3, c = {c} std", n)[0] for c in scales]
        panel.plot(scales, values, marker="o", label=f"{n} evaluations")
        color = panel.lines[-1].get_color()
        panel.axhline(over_seeds(results, "mixture", "newton 3", n)[0], color=color, linestyle=":", linewidth=1)
    panel.set(
        xscale="log", yscale="log", xlabel="node_scale / standard deviation of the data", ylabel="squared Frechet distance"
    )
    panel.set_xticks(scales, scales)
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7, title="dotted: node_scale = inf", title_fontsize=7)
    made["node_scale.png"] = figure

    for name, figure in made.items():
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)


def write(results: dict, docs: Path) -> None:
    """The pictures, and the tables between their markers in the page."""
    figures(results, docs)
    page = docs / "quality.md"
    text = page.read_text()
    for name, made in tables(results).items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        text = f"{before}<!-- {name} -->\n{made}\n<!-- end -->\n{rest.split('<!-- end -->' + chr(10), 1)[1]}"
    page.write_text(text)
