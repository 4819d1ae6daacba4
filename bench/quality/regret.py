"""Regret: how far a sampler is behind the best one where both are measured. A default is judged by its worst case."""

import statistics
from typing import NamedTuple

from guidance import FROM_80, limit_levels
from samplers import kind_of

NETWORKS, EXACT = ("emoji", "fashion", "digits_classes"), ("mixture_guided",)


class Place(NamedTuple):
    """One column of the study: everything but the sampler."""

    problem: str
    guidance: float
    levels: str
    evaluations: int

    def __str__(self):
        return f"{self.problem}, guidance {self.guidance:g}, {self.levels}, {self.evaluations}"


def distances(results: dict) -> dict[Place, dict[str, float]]:
    """Squared Frechet distances to the limit under guidance, means over seeds; of each place, by sampler. Flows are not among them."""
    found = {}
    for key, result in results.items():
        where, sampler, evaluations, _ = key.split(" | ")
        problem, *rest = where.split(", ", 2)
        if len(rest) == 2 and rest[0].startswith("guidance ") and not problem.endswith(" as flow"):
            place = Place(problem, float(rest[0].removeprefix("guidance ")), rest[1], int(evaluations))
            found.setdefault(place, {}).setdefault(sampler, []).append(result["frechet"])
    return {place: {name: statistics.mean(values) for name, values in of.items()} for place, of in found.items()}


def regrets(measured: dict[Place, dict[str, float]]) -> dict[Place, dict[str, float]]:
    """(floor + excess) / (floor + least excess) of each sampler at each place: 1 is the best.

    The excess is over the floor of the sampler's own kind, that of its limit's own samples; adding the smallest floor to both keeps
    differences that the number of samples hides from counting.
    """
    floors = {}
    for place, of in measured.items():
        for name, distance in of.items():
            if name.startswith("limit, "):
                floors.setdefault((place.problem, place.guidance, place.levels), {})[name.removeprefix("limit, ")] = distance
    result = {}
    for place, of in measured.items():
        at_ends = (limit_levels(place.levels), FROM_80)  # the floors are alike, and not measured at both for every problem
        floor = next((floors[key] for ends in at_ends if (key := (place.problem, place.guidance, ends)) in floors), None)
        samplers = [name for name in of if not name.startswith("limit, ")]
        if floor and samplers:
            least = min(floor.values())
            excess = {name: max(of[name] - floor.get(kind_of(name), least), 0.0) for name in samplers}
            best = min(excess.values())
            result[place] = {name: (least + excess[name]) / (least + best) for name in samplers}
    return result


class Summary(NamedTuple):
    worst: float
    median: float
    where: Place
    places: int


def summary(regret: dict[Place, dict[str, float]], sampler: str, chosen) -> Summary | None:
    """Of a sampler, over the places that `chosen(place)` takes; None where it was not measured."""
    of = {place: values[sampler] for place, values in regret.items() if sampler in values and chosen(place)}
    if not of:
        return None
    where = max(of, key=of.get)
    return Summary(of[where], statistics.median(of.values()), where, len(of))


def at(problems, levels, evaluations):
    """A choice of places; None takes all."""
    return lambda place: (
        place.problem in problems
        and (levels is None or place.levels in levels)
        and (evaluations is None or place.evaluations in evaluations)
    )
