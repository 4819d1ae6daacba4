"""Turns bench/results/NAME.json into a table in docs/benchmarks.md, between its markers, and docs/roofline.png.

pytest bench --benchmark-json=bench/results/NAME.json && python bench/report.py bench/results/NAME.json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [
    "1x4x64x64", "1x4x128x128", "1x16x128x128", "8x4x128x128", "256x3x64x64", "1x16x21x90x160", f"1x{64 << 20}", f"1x{512 << 20}",
]  # fmt: skip
NAMES = {f"1x{64 << 20}": "64 Mi", f"1x{512 << 20}": "512 Mi"}
RIVALS = [
    "eager expression", "torch.compile", "torch.compile, reduce-overhead", "existing samplers", "DPM-Solver++ 2M SDE of diffusers",
]  # fmt: skip
COLUMNS = [
    ("no noise", "torch.add"), ("no noise", "fused"), ("torch", "fused"), ("portable", "fused"), ("portable", "NVRTC"), ("portable", "Triton"),
]  # fmt: skip


def medians(results: dict) -> dict:
    """(noise, dtype, shape, contender) to the row of one order-3 step."""
    rows = {}
    for row in results["benchmarks"]:
        if row["group"].startswith("order 3"):
            _, source, dtype, shape = row["group"].split(", ")
            rows[source, dtype, shape, row["contender"]] = row
    return rows


def in_words(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


def table(results: dict) -> str:
    """Markdown: the fused step by each noise, in microseconds and as a share of the copy's bandwidth, and the rivals' multiples."""
    rows, machine = medians(results), results["machine"]
    lines = [
        f"One step of order 3 on an {machine['device'].replace('NVIDIA ', '')} (driver {machine['driver']}, torch {machine['torch']}, "
        f"CUDA {machine['cuda']}, Triton {machine['triton']}), medians in one run: microseconds, and in brackets the bandwidth as a "
        "share of `copy_`'s. Rivals draw their noise too: as many times as long as the step with torch's stream.",
        "",
        "| | `torch.add` | no noise | torch's stream | portable | NVRTC, portable | Triton, portable | eager | torch.compile | its reduce-overhead | existing samplers | diffusers' SDE-DPM-Solver++ 2M |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        for shape in SHAPES:
            cells = []
            for source, contender in COLUMNS:
                row = rows.get((source, dtype, shape, contender))
                share = row["bytes"] / row["median"] / 1e9 / row["copy_gb_s"] if row else 0
                large = shape in NAMES or shape == "1x16x21x90x160"
                cells.append(f"{in_words(row['median'])}{f' ({share:.0%})' if large else ''}" if row else "")
            ours = rows["torch", dtype, shape, "fused"]["median"]
            for rival in RIVALS:
                row = rows.get(("torch", dtype, shape, rival))
                cells.append(f"{row['median'] / ours:.1f}" if row else "")
            name = NAMES.get(shape, f"({shape.replace('x', ',')})")
            lines.append(f"| {name}, {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def roofline(results: dict, path: Path) -> None:
    """Bandwidth against size, for the fused step and its rivals, under the line of a copy."""
    rows = medians(results)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    contenders = [("no noise", "fused"), ("portable", "fused"), ("torch", "fused"), *(("torch", rival) for rival in RIVALS)]
    for panel, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        for source, contender in contenders:
            points = [rows[source, dtype, shape, contender] for shape in SHAPES if (source, dtype, shape, contender) in rows]
            points = sorted((point["bytes"], point["bytes"] / point["median"] / 1e12) for point in points)
            ours = contender == "fused"
            label = f"fused, {'torch’s stream' if source == 'torch' else source}" if ours else contender
            panel.plot(*zip(*points, strict=True), marker="o" if ours else ".", linestyle="-" if ours else "--", label=label)
        largest = rows["no noise", dtype, SHAPES[-1], "fused"]
        panel.axhline(largest["copy_gb_s"] / 1e3, color="black", linewidth=0.8, label="copy_, 512 Mi")
        panel.set(xscale="log", yscale="log", title=dtype, xlabel="bytes that the fused step moves")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("TB/s")
    panels[1].legend(fontsize=7, loc="lower right")
    figure.suptitle(f"One step of order 3, {results['machine']['device']}")
    figure.savefig(path, dpi=110)


def main():
    results = json.loads(Path(sys.argv[1]).read_text())
    page = ROOT / "docs" / "benchmarks.md"
    before, rest = page.read_text().split("<!-- bench/report.py -->\n", 1)
    _, after = rest.split("<!-- end -->\n", 1)
    page.write_text(f"{before}<!-- bench/report.py -->\n{table(results)}\n<!-- end -->\n{after}")
    roofline(results, ROOT / "docs" / "roofline.png")


if __name__ == "__main__":
    main()
