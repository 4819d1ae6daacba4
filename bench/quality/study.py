"""The study of docs/quality.md: every sampler on every problem, a cell at a time, kept as they are measured.

make quality                                 # measures what bench/quality/results.json lacks, writes tables and figures
python bench/quality/study.py --quick        # a few cells, kept nowhere
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

import page
from cells import cells, measure, network_cells
from problems import data_std, digits_mixture
from samplers import RIVALS, contenders

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.json")


def kept() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(results: dict) -> None:
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
    partial.replace(RESULTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells with few samples, kept nowhere")
    parser.add_argument("--network", action="store_true", help="the trained network alone, also without a GPU (hours)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.quick:
        problem = digits_mixture()
        samplers = contenders(data_std(problem))
        for name in ("published, order 3", "newton 3, c = 10 std", *RIVALS):
            got = measure(problem, samplers[name], 8, 0, 1000)
            print(f"{name:28} frechet {got['frechet']:8.3f}  wasserstein {got['wasserstein']:.3f}")
        return
    results = kept()
    chosen = [] if args.network else list(cells())
    of_network = list(network_cells(args.device))
    if args.network or args.device != "cpu":
        chosen += of_network
    elif lacks := sum(key not in results for key, _ in of_network):
        print(f"{lacks} cells of the trained network are left out: they need a GPU")
    missing = [(key, cell) for key, cell in chosen if key not in results]
    for count, (key, cell) in enumerate(tqdm(missing, unit="cell"), 1):
        results[key] = cell()
        if count % 24 == 0 or count == len(missing):
            keep(results)
    page.write(results, ROOT / "docs")


if __name__ == "__main__":
    main()
