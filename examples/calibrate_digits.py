"""Calibrates a plan of five evaluations to the demo's network of digits, for any of its classes: digits_5.safetensors beside this file.

python examples/calibrate_digits.py
"""

import argparse
from pathlib import Path

import torch

from digits_unet import load_digits_unet
from ersde_fast import calibrate_plan, portable_noise
from ersde_fast.schedules import karras_sigmas

FILE = Path(__file__).with_name("digits_5.safetensors")


def calibrated(num_steps: int = 5, starts: int = 30, **options):
    """The plan, of a pilot of all classes."""
    net, sigmas = load_digits_unet(), karras_sigmas(32)
    x = sigmas[0].item() * portable_noise((starts, 1, 28, 28), seed=5, step=-1)
    labels = torch.nn.functional.one_hot(torch.arange(starts) % net.label_dim, net.label_dim).float()
    model = lambda x, sigma, labels: net.denoised(x, sigma[0], labels)  # noqa: E731
    told = {"noise_scaler": "sde_5", "guidance": 1.0, "sigma_data": net.sigma_data}
    return calibrate_plan(model, x, num_steps, sigmas, {"labels": labels}, **told, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    plan = calibrated()
    plan.save(args.out)
    print(plan.report)


if __name__ == "__main__":
    main()
