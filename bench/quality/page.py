"""The tables and pictures of the study's pages, from the cells that it has kept."""

import functools
import itertools
import math
from pathlib import Path

import calibrated
import cells
import flows
import guidance
import page_elsewhere
import regret
from samplers import AT_THE_END, BY_LEVEL, KINDS, RIVALS, SCALER_FAMILIES, SCALERS, STOCHASTIC, contenders, under_guidance
from written import markdown, number, over_pilots, over_seeds, plain, with_spread

OURS = "newton 3, c = 10 std"
PUBLISHED = "published, order 3"


def floor(results: dict, problem: str, what="frechet") -> float:
    """The same of exact samples, or of the network's own limit."""
    problem = problem.partition(",")[0]
    return over_seeds(results, problem, cells.FLOOR, cells.LIMIT_STEPS if "network" in problem else cells.EVALUATIONS[0], what)[
        0
    ]


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

    def share(sampler, n):
        cell, published = over_seeds(results, problem, sampler, n, what), over_seeds(results, of, PUBLISHED, n, what)
        return f"{(cell[0] - least) / (published[0] - least):.2f}" if cell else ""

    rows = [[s, *(share(s, n) for n in evaluations)] for s in samplers]
    rows = [row for row in rows if any(row[1:])]
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


NAMES = ("emoji", "fashion", "digits_classes", guidance.EXACT)


def plain_grid(results: dict, corner: str, columns: list[tuple], samplers: list[str], what="frechet", scale=1.0) -> str:
    """Samplers by columns (title, problem, evaluations), means alone, the smallest of several in bold; without empty rows."""

    def mean(of, sampler, n):
        cell = over_seeds(results, of, sampler, n, what)
        return None if cell is None else scale * cell[0]

    found = {sampler: [mean(of, sampler, n) for _, of, n in columns] for sampler in samplers}
    measured = [[value for value in column if value is not None] for column in zip(*found.values(), strict=True)]
    best = [min(column) if len(column) > 1 else None for column in measured]
    rows = [
        [
            sampler,
            *(
                f"**{plain(value)}**" if value is not None and value == least else plain(value)
                for value, least in zip(row, best, strict=True)
            ),
        ]
        for sampler, row in found.items()
        if any(value is not None for value in row)
    ]
    return markdown([corner, *(str(title) for title, _, _ in columns)], rows)


def floors(results: dict, of: str, steps: int) -> str:
    """One line of the limits' own distances."""
    found = {kind: over_seeds(results, of, f"limit, {kind}", steps) for kind in KINDS}
    return "floor: " + (", ".join(f"{cell[0]:.3g} ({kind})" for kind, cell in found.items() if cell) or "not measured")


def under(results: dict, name: str, g: float) -> str:
    """A problem at one guidance, levels from 80: by evaluations."""
    of = f"{name}, guidance {g:g}, {guidance.FROM_80}"
    made = plain_grid(results, f"{name}, guidance {g:g}", [(n, of, n) for n in guidance.EVALUATIONS], list(under_guidance(1.0)))
    return f"{made}\n\n{floors(results, of, guidance.COSTS[name].limit_steps)}"


def at_eight(results: dict, name: str, what: str, scale: float) -> str:
    columns = [(f"guidance {g:g}", f"{name}, guidance {g:g}, {guidance.FROM_80}", 8) for g in guidance.GUIDANCE]
    title = {
        "kid": "KID to the limit x 1000",
        "data": "squared Frechet distance to the data",
        "data_kid": "KID to the data x 1000",
    }
    return plain_grid(results, f"{name}, 8 evaluations: {title[what]}", columns, list(under_guidance(1.0)), what, scale)


def on_levels(results: dict, name: str, g: float, evaluations) -> str:
    levels = [*guidance.LEVELS, guidance.PLACED]
    columns = [(f"{at}: {n}", f"{name}, guidance {g:g}, {at}", n) for at in levels for n in evaluations]
    columns = [column for column in columns if over_seeds(results, column[1], "default", column[2])]
    return plain_grid(results, f"{name}, guidance {g:g}", columns, list(under_guidance(1.0)))


def as_flow(results: dict, name: str, shift: float) -> str:
    columns = [
        (f"guidance {g:g}: {n}", f"{name} as flow, guidance {g:g}, shift {shift:g}", n)
        for g in flows.GUIDANCE
        for n in flows.EVALUATIONS
    ]
    columns = [column for column in columns if over_seeds(results, column[1], "default", column[2])]
    return plain_grid(results, f"{name}, shift {shift:g}", columns, list(flows.contenders(1.0)))


def panels(regret_of: dict) -> dict:
    """Title to the choice of places, of those that were measured."""
    few, many = (5,), (6, 8, 10, 15, 20)
    made = {
        "networks, Karras from 80, 6 to 20": regret.at(regret.NETWORKS, [guidance.FROM_80], many),
        "networks, Karras from 80, 5": regret.at(regret.NETWORKS, [guidance.FROM_80], few),
        "networks, other levels": lambda place: place.problem in regret.NETWORKS and place.levels != guidance.FROM_80,
        "exact, Karras from 80, 6 to 20": regret.at(regret.EXACT, [guidance.FROM_80], many),
        "exact, Karras from 80, 5": regret.at(regret.EXACT, [guidance.FROM_80], few),
        "exact, other levels": lambda place: place.problem in regret.EXACT and place.levels != guidance.FROM_80,
    }
    return {title: chosen for title, chosen in made.items() if any(map(chosen, regret_of))}


def regret_table(results: dict, where: bool) -> str:
    """Worst and median of every sampler, and where the worst is."""
    of = regret.regrets(regret.distances(results))
    chosen = panels(of)
    rows = []
    for sampler in under_guidance(1.0):
        found = [regret.summary(of, sampler, choice) for choice in chosen.values()]
        parts = [["", ""] if it is None else [f"{plain(it.worst)}, {it.median:.2f}", str(it.where)] for it in found]
        rows.append([sampler, *(part for pair in parts for part in (pair if where else pair[:1]))])
    titles = [part for title in chosen for part in ([f"{title}: worst, median", "where"] if where else [title])]
    return markdown(["sampler" if where else "worst, median", *titles], [row for row in rows if any(row[1:])])


def regret_picture(results: dict, plt):
    """Every place a dot, the median a bar, the worst named; one panel for each choice of places."""
    of = regret.regrets(regret.distances(results))
    chosen, samplers = panels(of), list(under_guidance(1.0))
    figure, axes = plt.subplots(
        2, -(-len(chosen) // 2), figsize=(5 * -(-len(chosen) // 2), 7), layout="constrained", sharey=True
    )
    colors = dict(zip(guidance.GUIDANCE, plt.colormaps["viridis"]((0.0, 0.35, 0.65, 0.95)), strict=True))
    for panel in axes.flat[len(chosen) :]:
        panel.remove()
    for panel, (title, choice) in zip(axes.flat, chosen.items(), strict=False):
        for row, sampler in enumerate(samplers):
            places = [place for place, values in of.items() if choice(place) and sampler in values]
            if not places:
                continue
            spread = [row + 0.28 * (i / max(len(places) - 1, 1) * 2 - 1) for i in range(len(places))]
            values = [min(of[place][sampler], 100) for place in places]
            panel.scatter(values, spread, s=9, color=[colors[place.guidance] for place in places], linewidths=0)
            found = regret.summary(of, sampler, choice)
            panel.plot([found.median] * 2, [row - 0.4, row + 0.4], color="black", linewidth=1.5)
            worst = f"{found.worst:.2f}" if found.worst < 10 else f"{found.worst:.0f}" if found.worst < 1000 else "diverges"
            panel.annotate(
                worst, (min(found.worst, 100), row), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center"
            )
        panel.set(xscale="log", xlim=(0.93, 200), title=title, ylim=(len(samplers) - 0.5, -0.5))
        panel.set_yticks(range(len(samplers)), samplers)
        ticks = (1, 1.3, 2, 3, 5, 10, 30, 100)
        panel.set_xticks(ticks, ticks, fontsize=8)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for g, color in colors.items():
        axes.flat[0].scatter([], [], s=12, color=color, label=f"guidance {g:g}")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle("times the distance of the best sampler; a bar is the median, the number the worst", fontsize=11)
    return figure


def guidance_picture(results: dict, plt):
    """Distance against evaluations from 80, a row a problem and a column a guidance."""
    where = lambda name, g: f"{name}, guidance {g:g}, {guidance.FROM_80}"  # noqa: E731
    shown = [name for name in ("emoji", guidance.EXACT) if over_seeds(results, where(name, 5.0), "default", 8)]
    figure, axes = plt.subplots(
        len(shown), 4, figsize=(16, 3.6 * len(shown)), layout="constrained", sharex=True, sharey="row", squeeze=False
    )
    for name, row in zip(shown, axes, strict=True):
        for g, panel in zip(guidance.GUIDANCE, row, strict=True):
            panel.set_prop_cycle(color=plt.colormaps["tab10"].colors)
            for sampler in under_guidance(1.0):
                means = {n: cell[0] for n in guidance.EVALUATIONS if (cell := over_seeds(results, where(name, g), sampler, n))}
                style = "o-" if sampler.split(",")[0] in ("default", "told") else "s--" if sampler == PUBLISHED else ".:"
                panel.plot(list(means), list(means.values()), style, markersize=4, label=sampler)
            floor = over_seeds(results, where(name, g), "limit, sde_5", guidance.COSTS[name].limit_steps)
            if floor:
                panel.axhline(floor[0], color="black", linewidth=0.8, label="floor")
            panel.set(xscale="log", yscale="log", title=f"{name}, guidance {g:g}")
            panel.set_xticks(guidance.EVALUATIONS, guidance.EVALUATIONS)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        drawn = [y for panel in row for line in panel.lines for y in line.get_ydata()]
        row[0].set(ylabel="squared Frechet distance", ylim=(0.8 * min(drawn), min(max(drawn), 600 * min(drawn))))
    figure.supxlabel("evaluations")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return figure


def tables(results: dict) -> dict[str, str]:
    chosen = [
        "default",
        "told",
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
    if over_seeds(results, "network", "told", 8):
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
    made |= {"regret": regret_table(results, where=True), "regret, short": regret_table(results, where=False)}
    for name in NAMES:
        for g in guidance.GUIDANCE:
            if over_seeds(results, f"{name}, guidance {g:g}, {guidance.FROM_80}", "default", 8):
                made[f"{name} {g:g}"] = under(results, name, g)
        for g, evaluations in ((2.5, (8, 20)), (5.0, (8, 20)), (7.5, (8, 20))):
            if over_seeds(results, f"{name}, guidance {g:g}, {guidance.FROM_14}", "default", 8):
                made[f"{name} {g:g}, levels"] = on_levels(results, name, g, evaluations)
        if name != guidance.EXACT and over_seeds(results, f"{name}, guidance 5, {guidance.FROM_80}", "default", 8):
            made[f"{name} data"] = at_eight(results, name, "data", 1.0)
            if name != "digits_classes":
                made |= {f"{name} {what}": at_eight(results, name, what, 1e3) for what in ("kid", "data_kid")}
    for name in (guidance.EXACT, "fashion_flow", "fashion", "emoji", "digits_classes"):
        for shift in flows.SHIFTS:
            if over_seeds(results, f"{name} as flow, guidance 4, shift {shift:g}", "default", 8):
                made[f"{name} as flow {shift:g}"] = as_flow(results, name, shift)
    return made | calibration_tables(results)


def best_rival(results: dict, problems: list[str], n: int) -> str:
    """The mean and the name of the best of other packages' samplers, on the levels that are best for it."""
    found = {rival: [over_seeds(results, problem, rival, n) for problem in problems] for rival in RIVALS}
    means = {rival: min(cell[0] for cell in of if cell) for rival, of in found.items() if any(of)}
    name = min(means, key=means.__getitem__)
    return f"{means[name]:.3f} {name}"


def calibration(results: dict, problem: str, levels: list[str], counts=calibrated.STARTS, evaluations=calibrated.FEW) -> str:
    """Calibrated plans beside the same sampler uncalibrated and the best rival."""
    least = floor(results, problem)
    rows = [["the best of other packages, on its best levels", *(best_rival(results, levels, n) for n in evaluations)]]
    for kind, sampler in calibrated.UNCALIBRATED.items():
        rows.append([f"`{kind}`, uncalibrated", *(number(over_seeds(results, levels[1], sampler, n)) for n in evaluations)])
        for count in counts:
            of = f"{problem}, {count} starts"
            rows.append(
                [f"`{kind}`, calibrated on {count} starts", *(number(over_pilots(results, of, kind, n)) for n in evaluations)]
            )
            traces = [over_pilots(results, of, kind, n, what="trace") for n in evaluations]
            if any(traces):
                rows.append(["its variance, a share of the data's", *(f"{c[0]:.3f} ({c[1]:.3f})" if c else "" for c in traces)])
    title = f"{problem} ({least:.3f} of exact samples)"
    if of_ode := over_seeds(results, problem, cells.OF_ODE, cells.LIMIT_STEPS):
        title = f"{problem} (in {cells.LIMIT_STEPS} evaluations {least:.3f} by `sde_5`, {of_ode[0]:.3f} by `ode`)"
    return markdown([title, *map(str, evaluations)], rows)


def calibration_budgets(results: dict) -> str:
    rows = []
    for allowed in (calibrated.BUDGETS[0], None, calibrated.BUDGETS[1]):
        row = [str(allowed or "200, the default")]
        for n in calibrated.FEW:
            of = functools.partial(over_pilots, results, "mixture, 16 starts", n=n, evaluations=allowed, seeds=(0,))
            row.append(
                ", ".join(
                    [number(of(kind)).partition(" ")[0] for kind in calibrated.KINDS] + [f"{of('ode', what='spent')[0]:.0f}"]
                )
            )
        rows.append(row)
    return markdown(["evaluations allowed a start", *(f"{n}: `ode`, `sde_5`, spent" for n in calibrated.FEW)], rows)


def calibration_guided(results: dict, name: str, scales: tuple) -> str:
    rows = []
    for scale in scales:
        of = f"{name}, guidance {scale:g}"
        at = [f"{of}, {levels}" for levels in (guidance.FROM_80, guidance.PLACED)]
        for kind, sampler in calibrated.TOLD.items():
            limit = over_seeds(results, at[0], f"limit, {kind}", guidance.COSTS[name].limit_steps)
            for n in calibrated.FEW:
                told = [plain(cell[0]) if (cell := over_seeds(results, levels, sampler, n)) else "" for levels in at]
                made = over_pilots(results, f"{of}, 64 starts", kind, n)
                best = best_rival(results, at[:1], n)
                rows.append([f"{scale:g}, `{kind}`", str(n), plain(limit[0]), best, *told, with_spread(made)])
    titles = [
        "guidance, scaler",
        "evaluations",
        "limit",
        "best of other packages",
        "told, Karras",
        "told, placed",
        "calibrated on 64 starts",
    ]
    return markdown(titles, rows)


def calibration_coverage(results: dict) -> str:
    """Precision and recall of calibrated plans beside the same sampler uncalibrated and exact samples."""
    of, titles = "mixture, coverage", [f"{what} at {n}" for n in calibrated.COVERED for what in ("precision", "recall")]
    every = functools.partial(over_seeds, results, of)
    columns = [(n, what) for n in calibrated.COVERED for what in ("precision", "recall")]
    rows = [["exact samples", *(number(every(cells.FLOOR, calibrated.COVERED[0], what)) for _, what in columns)]]
    for kind, sampler in calibrated.UNCALIBRATED.items():
        rows.append([f"`{kind}`, uncalibrated", *(number(every(sampler, n, what)) for n, what in columns)])
        made = functools.partial(over_pilots, results, f"{of}, {calibrated.STARTS[0]} starts", kind)
        rows.append(
            [f"`{kind}`, calibrated on {calibrated.STARTS[0]} starts", *(number(made(n, what=what)) for n, what in columns)]
        )
    return markdown(["mixture", *titles], rows)


def calibration_pairs(results: dict) -> str:
    """The network of digits by the ODE against what the same starts come to in many steps."""
    rows = []
    for name, n in itertools.product(calibrated.PAIRED, calibrated.FEW):
        of = f"{name}, in pairs"
        starts = f"{of}, {calibrated.NETWORK_STARTS[name][0]} starts"
        row = [name, str(n)]
        for what in ("frechet", "median"):
            row += [plain(over_seeds(results, f"{of}{levels}", cells.OF_ODE, n, what)[0]) for levels in ("", ", placed")]
            row.append(with_spread(over_pilots(results, starts, "ode", n, what=what)))
        rows.append(row)
    each = ["Karras", "placed", "calibrated"]
    return markdown(["", "evaluations", *(f"{what}, {on}" for what in ("Frechet", "median") for on in each)], rows)


def calibration_worse(results: dict) -> str:
    """How many cells of calibrated plans are worse than the same sampler uncalibrated on placed levels, of the same seed."""
    found = {}
    for key, cell in results.items():
        if " starts | calibrated, " not in key or "frechet" not in cell:
            continue
        problem, name, n, seed = key.split(" | ")
        problem, kind = problem.rpartition(", ")[0], name.split(", ")[1]
        sampler = calibrated.TOLD[kind] if "guidance" in problem else calibrated.UNCALIBRATED[kind]
        if beside := results.get(f"{problem}, placed | {sampler} | {n} | {seed}"):
            found.setdefault(problem, []).append(cell["frechet"] / beside["frechet"])
    rows = []
    for problem, ratios in sorted(found.items()):
        worse = [ratio for ratio in ratios if ratio > 1]
        rows.append([problem, str(len(ratios)), str(len(worse) or "none"), f"{max(worse) - 1:.0%}" if worse else ""])
    return markdown(["", "cells", "worse", "by at most"], rows)


def calibration_tables(results: dict) -> dict[str, str]:
    if not over_pilots(results, "mixture, 16 starts", "ode", 8):
        return {}
    of_mixture = ["mixture", "mixture, placed", *(f"mixture, {spacing}" for spacing in cells.SPACINGS)]
    made = {
        "calibrated mixture": calibration(results, "mixture", of_mixture),
        "calibrated digits": calibration(results, "digits", ["digits", "digits, placed"]),
        "calibration, evaluations": calibration_budgets(results), "calibration, guided": calibration_guided(results, guidance.EXACT, calibrated.GUIDANCE),
        "calibration, coverage": calibration_coverage(results), "calibration, worse": calibration_worse(results),
    }  # fmt: skip
    for name, scales in calibrated.GUIDED_NETWORKS.items():
        if any(over_pilots(results, f"{name}, guidance {scale:g}, 64 starts", "sde_5", 8) for scale in scales):
            made[f"calibration, {name}"] = calibration_guided(results, name, scales)
    for name, counts in calibrated.NETWORK_STARTS.items():
        if over_pilots(results, f"{name}, {counts[-1]} starts", "ode", 8):
            made[f"calibrated {name}"] = calibration(results, name, [name, f"{name}, placed"], counts)
    if all(over_pilots(results, f"{name}, in pairs, 64 starts", "ode", calibrated.FEW[-1]) for name in calibrated.PAIRED):
        made["calibration, pairs"] = calibration_pairs(results)
    return made | page_elsewhere.tables(results)


def picture(results: dict, plt, names: tuple, evaluations: tuple, limits: tuple):
    """Distance against evaluations, one panel a problem."""
    drawn = [PUBLISHED, "newton 3", "default", "told", OURS, f"{OURS}, ode", *RIVALS]
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
    if over_seeds(results, "network", "told", 8):
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

    made["quality_regret.png"] = regret_picture(results, plt)
    made["quality_guidance.png"] = guidance_picture(results, plt)
    for name, figure in made.items():
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)


PAGES = ("quality.md", "quality_tables.md", "quality_flows.md", "calibration.md")


def with_tables(text: str, made: dict[str, str]) -> str:
    """A page with the tables between their markers."""
    for name, table in made.items():
        before, marker, rest = text.partition(f"<!-- {name} -->\n")
        if marker:
            text = f"{before}{marker}{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


def write(results: dict, docs: Path) -> None:
    """The pictures, and the tables between their markers in the pages."""
    figures(results, docs)
    made = tables(results)
    for page in PAGES:
        (docs / page).write_text(with_tables((docs / page).read_text(), made))
