"""The study of docs/quality.md: every sampler on every problem, a cell at a time, kept as they are measured.

make quality                                                   # measures what bench/quality/results.json lacks, writes the pages
python bench/quality/study.py --quick                          # a few cells, kept nowhere
python bench/quality/study.py --take networks --shard 0/2 --seconds 560 --out part0.json     # one GPU of two, stopped in time
python bench/quality/study.py --take calibrated_networks calibrated_guided --shard 0/18 --out part0.json    # of processes beside it
python bench/quality/study.py --merge part0.json part1.json    # puts such parts into results.json and writes the pages
python bench/quality/study.py --again default told             # measures these samplers anew
"""

import argparse
import json
import re
import time
from pathlib import Path

import torch
from tqdm import tqdm

import calibrated
import calibrated_elsewhere
import cells
import flows
import guidance
import page
from guidance import Cell
from problems import data_std, digits_mixture
from samplers import RIVALS, contenders

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")
EXACT = {
    "exact": cells.cells, "guided": guidance.exact_cells, "flows": flows.exact_cells, "calibrated": calibrated.exact_cells,
    "calibrated_elsewhere": calibrated_elsewhere.exact_cells,
}  # fmt: skip
ON_GPU = {
    "networks": guidance.network_cells, "digits": cells.network_cells, "network_flows": flows.network_cells,
    "calibrated_networks": calibrated.network_cells, "calibrated_guided": calibrated.guided_network_cells,
    "calibrated_pairs": calibrated.paired_cells, "calibrated_network_elsewhere": calibrated_elsewhere.network_cells,
}  # fmt: skip


def kept(path: Path = RESULTS) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def keep(results: dict, path: Path = RESULTS) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
    partial.replace(path)


def wanted(parts: list[str], device: str) -> list[Cell]:
    """The cells of the parts, in the order in which they are measured."""
    return [Cell(*cell) for part in parts for cell in (EXACT[part]() if part in EXACT else ON_GPU[part](device))]


def shard(chosen: list[Cell], index: int, count: int) -> list[Cell]:
    """Those of one process of several: each group, in order, goes to the process with the least to do."""
    group_of = lambda cell: cell.group or cell.key.partition(" | ")[0]  # noqa: E731
    seconds, owner, busy = {}, {}, [0.0] * count
    for cell in chosen:
        seconds[group_of(cell)] = seconds.get(group_of(cell), 0.0) + (cell.seconds or 1.0)
    for group, cost in seconds.items():
        owner[group] = busy.index(min(busy))
        busy[owner[group]] += cost
    return [cell for cell in chosen if owner[group_of(cell)] == index]


def rounded(result: dict) -> dict:
    return {name: float(f"{value:.6g}") for name, value in result.items()}


def measure(chosen: list[Cell], results: dict, out: Path, seconds: float) -> None:
    """Measures into `results`, which are kept every twenty seconds, until all are or the time is up."""
    saved = time.monotonic()
    try:
        for cell in tqdm(chosen, unit="cell"):
            if time.monotonic() - START + cell.seconds > seconds:
                break
            results[cell.key] = rounded(cell.measure())
            if time.monotonic() - saved > 20:
                keep(results, out)
                saved = time.monotonic()
    finally:
        keep(results, out)


def quick() -> None:
    problem = digits_mixture()
    samplers = contenders(data_std(problem))
    for name in ("published, order 3", "newton 3, c = 10 std", *RIVALS):
        got = cells.measure(problem, samplers[name], 8, 0, 1000)
        print(f"{name:28} frechet {got['frechet']:8.3f}  wasserstein {got['wasserstein']:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells with few samples, kept nowhere")
    parser.add_argument(
        "--take", nargs="+", choices=[*EXACT, *ON_GPU], help="these parts alone; networks also without a GPU (days)"
    )
    parser.add_argument("--only", type=re.compile, metavar="PATTERN", help="of these the cells whose keys it is found in")
    parser.add_argument("--again", nargs="+", default=[], metavar="SAMPLER", help="measures their cells anew")
    parser.add_argument("--shard", type=lambda text: tuple(map(int, text.split("/"))), default=(0, 1), metavar="I/N")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no cell is begun that would end after them")
    parser.add_argument("--out", type=Path, help="keeps what is measured there, and writes no page")
    parser.add_argument("--merge", nargs="+", type=Path, help="measures nothing")
    parser.add_argument("--cost", action="store_true", help="says what the cells would take of an H100; measures nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.quick:
        return quick()
    results = kept()
    if args.merge:
        for part in args.merge:
            results |= kept(part)
        keep(results)
        return page.write(results, ROOT / "docs")

    parts = args.take or [*EXACT, *(ON_GPU if args.device != "cpu" else [])]
    again = lambda key: key.split(" | ")[1].partition(",")[0] in args.again  # noqa: E731
    missing = [cell for cell in wanted(parts, args.device) if cell.key not in results or again(cell.key)]
    if args.only:
        missing = [cell for cell in missing if args.only.search(cell.key)]
    missing = shard(missing, *args.shard)
    if args.cost:
        groups = {}
        for cell in missing:
            groups[cell.group] = groups.get(cell.group, 0.0) + cell.seconds
        for group, seconds in groups.items():
            print(f"{seconds:7.0f} s  {group}")
        return print(f"{sum(groups.values()):7.0f} s  of an H100 for {len(missing)} cells")
    if args.out:
        return measure(missing, kept(args.out), args.out, args.seconds)
    measure(missing, results, RESULTS, args.seconds)
    if lacks := sum(cell.key not in results for cell in wanted(list(ON_GPU), args.device)):
        print(f"{lacks} cells of trained networks are left out: they need a GPU")
    page.write(results, ROOT / "docs")


if __name__ == "__main__":
    main()
