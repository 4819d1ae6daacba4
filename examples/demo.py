"""The main job: 100 handwritten digits in 20 evaluations of a small network, where the time went, and what others would have given.

python examples/demo.py                 # writes out/digits.png, out/path.png, out/beside.png and out/five.png
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import ersde_fast
from calibrate_digits import FILE
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


def sample(net, plan, labels, seed, what):
    """The samples, every step's input, (x, history) of each, and the seconds in the network and in the step."""
    x = plan.sigmas[0].item() * ersde_fast.portable_noise((len(labels), 1, 28, 28), seed, step=-1)
    history, steps, times = [], [], {"network": 0.0, "step": 0.0}
    for i in tqdm(range(plan.num_steps), desc=what, unit="evaluation"):
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
    for _ in tqdm(range(repeats), desc="one step, by each way", unit="run"):
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


def beside(net, seed):
    """A digit of each class from the same noise by the ODE, 8 evaluations a sampler and 40 for where all of them lead; and how far
    each ends from that, the root of the mean square."""
    labels = torch.eye(net.label_dim)
    ways = {"DDIM": {"order": 1}, "ComfyUI's er_sde": {"integration_points": 200}, "ersde-fast": {"guidance": 1.0}}
    made = {
        name: sample(net, ode_plan(net, 8, **options), labels, seed, f"8 evaluations by {name}")[0]
        for name, options in ways.items()
    }
    limit = sample(net, ode_plan(net, 40, guidance=1.0), labels, seed, "where all lead, 40 evaluations")[0]
    distances = {name: (digits - limit).square().mean().sqrt().item() for name, digits in made.items()}
    return [*made.values(), limit], distances


def ode_plan(net, num_steps, **options):
    return ersde_fast.er_sde_plan(karras_sigmas(num_steps), noise_scaler="ode", sigma_data=net.sigma_data, **options)


def in_five(net, labels, seed):
    """Rows of the same digits in 5 evaluations: on Karras et al.'s levels, and by the plan that is calibrated to the network."""
    plans = {
        "5 evaluations": ersde_fast.er_sde_plan(karras_sigmas(5), guidance=1.0, sigma_data=net.sigma_data),
        "5 evaluations, calibrated": ersde_fast.Plan.load(FILE),
    }
    left, right = (sample(net, plan, labels, seed, what)[0].split(10) for what, plan in plans.items())
    gap = torch.ones(1, 28, 14)
    return [torch.cat([*a, gap, *b], dim=-1)[None] for a, b in zip(left, right, strict=True)]


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
    digits, steps, times = sample(net, plan, labels, args.seed, "100 digits")

    image(list(digits.split(10))).save(args.out / "digits.png")
    # One digit a row: the noised sample at every second step, scaled to unit range, and the result.
    frames = [x / (plan.sigmas[i] ** 2 + 0.6**2).sqrt() for i, (x, _) in enumerate(steps)][::2]
    path = [frame[::10] for frame in [*frames, digits]]
    image([torch.stack([frame[row] for frame in path]) for row in range(10)]).save(args.out / "path.png")

    rows, distances = beside(net, args.seed)
    image(rows).save(args.out / "beside.png")
    image(in_five(net, labels, args.seed)).save(args.out / "five.png")
    paper = ersde_fast.er_sde_plan(karras_sigmas(20), order=3, method="taylor")  # the rule of existing samplers
    count, milliseconds, errors = compare(paper, steps, args.seed)

    print(
        f"\nMade: {args.out}/digits.png, 100 digits in 20 evaluations, a class a row; path.png, how they came out of the noise"
    )
    print(f"      beside.png, a row each: {', '.join(distances)}, 8 evaluations each; where all of them lead")
    print(
        "      five.png, 5 evaluations from the same noise: left Karras et al.'s levels, right a plan calibrated to the network"
    )
    total = sum(times.values())
    print(f"\nTime of 100 digits{'':<11}seconds   share      ({torch.get_num_threads()} threads, seed {args.seed})")
    for name in ("network", "step"):
        print(f"  in the {name:<20}{times[name]:>9.3f}{times[name] / total:>8.2%}")
    print(f"\nOne order-3 step{'':<13}     ms   times   largest error      ({count} steps, 9 runs, medians)")
    for name, t in milliseconds.items():
        error = f"{errors[name]:.1e}" if name in errors else "as above"
        print(f"  {name:<27}{t:>7.3f}{t / milliseconds['fused step']:>8.1f}{error:>16}")
    print("  (of the largest number of the step; existing samplers sum 200 points where the plan integrates exactly)")
    print(f"\nAfter 8 evaluations, from where all of them lead: {', '.join(f'{n} {d:.3f}' for n, d in distances.items())}")
    print(
        "\nNext: python -m ersde_fast (what runs here), README.md (your own tool), docs/choosing.md (which sampler for which model)"
    )


if __name__ == "__main__":
    main()
