"""The main job: 100 handwritten digits in 20 evaluations of a small network, and where the time went.

python examples/demo.py                 # writes out/digits.png and out/path.png
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import ersde_fast
from digits_unet import load_digits_unet
from ersde_fast.schedules import karras_sigmas

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
import rivals  # noqa: E402


def image(rows: list[torch.Tensor], scale: int = 3) -> Image.Image:
    """A picture of rows of images [n, 1, height, width] in [-1, 1]."""
    grid = torch.cat([torch.cat(list(row[:, 0]), dim=1) for row in rows])
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def sample(net, plan, labels, seed):
    """The samples, and every step's input: (x, history) of each."""
    x = plan.sigmas[0].item() * ersde_fast.portable_noise((len(labels), 1, 28, 28), seed, step=-1)
    history, steps, times = [], [], {"network": 0.0, "step": 0.0}
    for i in tqdm(range(plan.num_steps), desc="sampling 100 digits", unit="evaluation"):
        start = time.perf_counter()
        output = net.edm_output(x, plan.sigmas[i].item(), labels)
        middle = time.perf_counter()
        before, older = x, history[: plan.order - 1]
        x, denoised = ersde_fast.fast_step(plan, i, x, [output, *older], seed=seed, prediction_type="edm")
        history = [denoised, *older]
        steps.append((before, history))
        times["network"] += middle - start
        times["step"] += time.perf_counter() - middle
    return x, steps, times


def compare(plan, steps, seed, repeats=9):
    """Milliseconds of one run's order-3 steps, by each way to do them on the same inputs, and the largest difference."""
    l, alphas = plan.er_lambdas.float(), plan.alphas.float()
    steady = range(2, plan.num_steps - 1)

    def existing(i, x, history):
        slope_1 = (history[1] - history[2]) / (l[i - 1] - l[i - 2])
        return lambda noise: rivals.published_step(x, [history[0], history[1], slope_1], l, alphas, i, noise)

    noise = {i: ersde_fast.portable_noise(steps[i][0].shape, seed, step=i) for i in steady}
    others = {i: existing(i, *steps[i]) for i in steady}
    ways = {
        "fused step": lambda i: ersde_fast.fast_step(plan, i, *steps[i], seed=seed),
        "fused step, torch.randn": lambda i: ersde_fast.fast_step(plan, i, *steps[i]),
        "reference": lambda i: ersde_fast.reference_step(plan, i, *steps[i], noise=torch.randn_like(steps[i][0])),
        "existing samplers": lambda i: others[i](torch.randn_like(steps[i][0])),
    }
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            for i in steady:
                way(i)
            times[name].append(time.perf_counter() - start)

    def difference(way):
        """Relative to the largest number in the step, the worst of all steps."""
        exact = {i: ersde_fast.reference_step(plan, i, steps[i][0].double(), steps[i][1], noise=noise[i]) for i in steady}
        return max(((way(i) - exact[i]).abs().max() / exact[i].abs().max()).item() for i in steady)

    differences = {
        "fused step": difference(ways["fused step"]),
        "reference": difference(lambda i: ersde_fast.reference_step(plan, i, *steps[i], noise=noise[i])),
        "existing samplers": difference(lambda i: others[i](noise[i])),
    }
    return len(steady), {name: sorted(t)[len(t) // 2] / len(steady) * 1e3 for name, t in times.items()}, differences


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    net = load_digits_unet()
    plan = ersde_fast.er_sde_plan(karras_sigmas(20), order=3, sigma_data=net.sigma_data)
    classes = torch.arange(net.label_dim)
    labels = torch.nn.functional.one_hot(classes.repeat_interleave(10), net.label_dim).float()
    digits, steps, times = sample(net, plan, labels, args.seed)

    image(list(digits.split(10))).save(args.out / "digits.png")
    # One digit a row: the noised sample at every second step, scaled to unit range, and the result.
    frames = [x / (plan.sigmas[i] ** 2 + 0.6**2).sqrt() for i, (x, _) in enumerate(steps)][::2]
    path = [frame[::10] for frame in [*frames, digits]]
    image([torch.stack([frame[row] for frame in path]) for row in range(10)]).save(args.out / "path.png")

    paper = ersde_fast.er_sde_plan(karras_sigmas(20), order=3, method="taylor")  # the rule of existing samplers
    count, milliseconds, differences = compare(paper, steps, args.seed)
    total = sum(times.values())
    print(f"\nwrote {args.out / 'digits.png'} and {args.out / 'path.png'}")
    print(
        f"\n20 evaluations of 100 digits, {torch.get_num_threads()} threads, seed {args.seed}, backends {ersde_fast.available_backends()}"
    )
    print(f"  in the network {times['network']:8.2f} s  {times['network'] / total:8.3%}")
    print(f"  in the step    {times['step']:8.4f} s  {times['step'] / total:8.3%}")
    print(f"\none order-3 step of {tuple(digits.shape)} float32, with its noise; median over 9 runs of {count} steps")
    print(f"  {'':<26}{'ms':>8}{'times the fused':>18}{'largest error':>16}")
    for name, t in milliseconds.items():
        error = f"{differences[name]:.1e}" if name in differences else "as above"
        print(f"  {name:<26}{t:>8.3f}{t / milliseconds['fused step']:>18.1f}{error:>16}")
    print("largest error: against float64 with the same noise, relative to the largest number of the step;")
    print("existing samplers sum 200 points where the plan integrates exactly.")


if __name__ == "__main__":
    main()
