"""How the pages' tables are written: cells over seeds and pilots, numbers, Markdown."""

import statistics
from collections.abc import Callable, Iterable

import calibrated
import cells


def over_seeds(
    results: dict, problem: str, sampler: str, evaluations: int, what="frechet", seeds=cells.SEEDS
) -> tuple[float, float] | None:
    """Mean and spread (largest less smallest, halved) of a cell over its seeds; None where it was not measured."""
    found = (results.get(f"{problem} | {sampler} | {evaluations} | {seed}", {}).get(what) for seed in seeds)
    return _over(found)


def over_pilots(
    results: dict, problem: str, kind: str, n: int, evaluations=None, what="frechet", seeds=cells.SEEDS
) -> tuple[float, float] | None:
    """Mean and spread of a cell of calibrated plans over pilots and seeds."""
    names = [calibrated.name_of(pilot, kind, evaluations) for pilot in calibrated.PILOTS]
    return _over(results.get(f"{problem} | {name} | {n} | {seed}", {}).get(what) for name in names for seed in seeds)


def _over(found: Iterable[float | None]) -> tuple[float, float] | None:
    values = [value for value in found if value is not None]
    return (statistics.mean(values), (max(values) - min(values)) / 2) if values else None


def number(cell: tuple[float, float] | None, diverged: float = 100.0) -> str:
    if cell is None:
        return ""
    mean, spread = cell
    if not mean < diverged:
        return "diverges"
    return f"{mean:.2f}" if mean >= 1 else f"{mean:.3f} ({spread:.3f})"


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(value: float | None) -> str:
    """Three digits."""
    return "" if value is None else f"{value:.3g}" if value < 1000 else "diverges"


def with_spread(cell: tuple[float, float] | None, written: Callable[[float], str] = plain) -> str:
    """The mean and, in brackets, the spread if there is one."""
    return "" if cell is None else written(cell[0]) + (f" ({written(cell[1])})" if cell[1] else "")
