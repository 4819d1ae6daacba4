"""The tables of docs/calibration.md, "Where it ends", from the cells of `calibrated_elsewhere`."""

import functools

import calibrated
import calibrated_elsewhere as elsewhere
import cells
import guidance
from calibrated import FEW, KINDS, UNCALIBRATED
from calibrated_elsewhere import SCALES, TOLD, other_classes
from written import markdown, number, over_pilots, over_seeds, with_spread

Cell = tuple[float, float] | None


def power(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


def small(cell: Cell) -> str:
    return with_spread(cell, power)


def distance(cell: Cell) -> str:
    return number(cell) if cell and cell[1] else number(cell).partition(" ")[0]


def told(results: dict, scale: float, n: int) -> str:
    return small(over_seeds(results, other_classes(scale), TOLD, n, "median"))


def fitted(results: dict, used: float, n: int, words: str) -> str:
    return small(over_pilots(results, other_classes(used, words), "ode", n, what="median"))


def conditions(results: dict) -> str:
    rows = [
        [f"{scale:g}", str(n), told(results, scale, n), *(fitted(results, scale, n, known) for known in elsewhere.KNOWN)]
        for scale in SCALES
        for n in FEW
    ]
    titles = [f"calibrated on {known}" for known in elsewhere.KNOWN]
    return markdown(["guidance", "evaluations", "uncalibrated, told, placed", *titles], rows)


def strengths(results: dict) -> str:
    n, own = elsewhere.OTHER_SCALES_AT, next(iter(elsewhere.KNOWN))
    words = lambda used, of: own if used == of else f"guidance {of:g}"  # noqa: E731
    rows = [
        [f"{used:g}", told(results, used, n), *(fitted(results, used, n, words(used, of)) for of in SCALES)] for used in SCALES
    ]
    return markdown(["used at", "uncalibrated, told, placed", *(f"calibrated at {of:g}" for of in SCALES)], rows)


def halves(results: dict) -> str:
    made = functools.partial(fitted, results, n=elsewhere.OTHER_SCALES_AT)
    kinds = {"float64": next(iter(elsewhere.KNOWN)), **{name: name for name in elsewhere.HALVES}}
    rows = [[f"{scale:g}", *(made(used=scale, words=words) for words in kinds.values())] for scale in elsewhere.HALVED]
    return markdown(["guidance", *(f"pilot in {name}" for name in kinds)], rows)


def as_flows(results: dict) -> str:
    def pair(n, *of_kind):
        return " / ".join(filter(None, (distance(of(kind, n)) for of in of_kind for kind in KINDS)))

    of = elsewhere.FLOW
    uncalibrated = lambda levels: lambda kind, n: over_seeds(results, f"{of}, {levels}", UNCALIBRATED[kind], n)  # noqa: E731
    columns = [uncalibrated(elsewhere.EVEN), uncalibrated(guidance.PLACED)]
    columns.append(lambda kind, n: over_pilots(results, f"{of}, 16 starts", kind, n))
    rows = [[str(n), *(pair(n, column) for column in columns)] for n in (*FEW, calibrated.PILOT_STEPS)]
    return markdown(["evaluations", f"even levels, {elsewhere.EVEN}", "placed", "calibrated"], rows)


MIDDLE = {
    "analytic": "analytic weights of its levels",
    "cut": "cut, first weights analytic",
    "placed": "placed levels",
    "calibrated": "calibrated from there",
}


def middle(results: dict) -> str:
    whole = elsewhere.WHOLE
    rows = [
        [
            f"{i} of {whole}",
            *(small(over_pilots(results, elsewhere.from_step(i), "ode", whole - i, what=what)) for what in MIDDLE),
        ]
        for i in elsewhere.CUTS
    ]
    return markdown(["from step", *MIDDLE.values()], rows)


def beyond(results: dict) -> str:
    rows = [
        [
            name,
            str(n),
            distance(over_seeds(results, f"{name}, {guidance.PLACED}", cells.OF_ODE, n, seeds=(0,))),
            distance(over_pilots(results, f"{name}, 16 starts", "ode", n, seeds=(0,))),
        ]
        for name in cells.PROBLEMS
        for n in elsewhere.BEYOND
    ]
    return markdown(["problem", "evaluations", "`ode`, uncalibrated, placed", "`ode`, calibrated on 16 starts"], rows)


def network(results: dict) -> str:
    rows = []
    for words, (_, _, evaluations) in elsewhere.USES.items():
        of = elsewhere.of_use(words)
        for n in evaluations:
            made = over_pilots(results, of, "ode", n, what="median")
            rows.append([words, str(n), small(over_seeds(results, of, TOLD, n, "median")), small(made)])
    return markdown(["network of digits", "evaluations", "uncalibrated, told, placed", "calibrated"], rows)


def tables(results: dict) -> dict[str, str]:
    made = {
        "conditions": conditions, "strengths": strengths, "half precision": halves, "flows": as_flows, "middle": middle,
        "beyond": beyond, "network elsewhere": network,
    }  # fmt: skip
    return {f"calibration, {name}": table(results) for name, table in made.items()}
