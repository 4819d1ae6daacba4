"""Policy gradients: the digits network learns to write with a broad pen, from rewards of its own samples alone.

python examples/reward.py               # writes out/reward_before.png and out/reward_after.png

Each step that adds noise draws from a Gaussian whose mean is the network's. REINFORCE raises its log-density where a sample turned
out better than the others of its digit (GRPO's advantages). The last steps are the ODE's: they draw the details, and are not trained.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch.nn import functional as F

import ersde_fast
from demo import ROOT, image
from digits_unet import load_digits_unet
from ersde_fast.schedules import karras_sigmas

STEPS, NOISY_STEPS = 8, 5
ETA = [1.0] * NOISY_STEPS + [0.0] * (STEPS - NOISY_STEPS)
PLAN = ersde_fast.er_sde_plan(karras_sigmas(STEPS, 0.03, 20), order=1, eta=ETA, sigma_data=0.6)


@torch.no_grad()
def rollout(net, labels, seed):
    """What each step starts from, and the images behind the last one."""
    path = [PLAN.sigmas[0].item() * ersde_fast.portable_noise((len(labels), 1, 28, 28), seed, step=-1)]
    for i in range(STEPS):
        output = net.edm_output(path[i], PLAN.sigmas[i].item(), labels)
        path.append(ersde_fast.fast_step(PLAN, i, path[i], [output], seed=seed, prediction_type="edm")[0])
    return path


def thickness(images):
    """The reward, which has no gradient: the share of pixels that are white with all of their neighbours."""
    return (-F.max_pool2d(-images, 3, stride=1) > 0).double().mean((1, 2, 3))


def train(net, digits, samples, iterations, learning_rate=1e-4, trained_steps=2, hold=0.02):
    """Fine-tunes the network on `samples` images of each digit an iteration; yields their mean reward.

    `hold` is the price of an output's squared distance to the original network's: for free, backgrounds turn grey.
    """
    labels = torch.eye(net.label_dim)[digits].repeat_interleave(samples, dim=0)
    original = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.requires_grad_(True).parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    for iteration in range(iterations):
        path = rollout(net, labels, seed=iteration + 1)
        rewards = thickness(path[-1]).view(-1, samples)
        spread = rewards.std(1, keepdim=True) + 1e-4
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).flatten()
        optimizer.zero_grad()
        for i in torch.randperm(NOISY_STEPS, generator=generator)[:trained_steps].tolist():
            output = net.edm_output(path[i], PLAN.sigmas[i].item(), labels)
            log_prob = ersde_fast.step_log_prob(PLAN, i, path[i], [output], path[i + 1], prediction_type="edm")
            drift = (output - original.edm_output(path[i], PLAN.sigmas[i].item(), labels)).square().sum((1, 2, 3))
            (hold * drift - advantages * log_prob).mean().backward()
        optimizer.step()
        yield rewards.mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    net, labels = load_digits_unet(), torch.eye(10).repeat_interleave(10, dim=0)
    before = rollout(net, labels, seed=0)[-1]
    for iteration, reward in enumerate(train(net, range(10), samples=8, iterations=args.iterations)):
        print(f"iteration {iteration:3d}  mean reward {reward:.4f}", flush=True)
    after = rollout(net, labels, seed=0)[-1]
    for name, images in {"before": before, "after": after}.items():
        image(list(images.split(10))).save(args.out / f"reward_{name}.png")
        print(f"{name}: mean reward {thickness(images).mean():.4f} of 100 digits of a seed that was not trained on")


if __name__ == "__main__":
    main()
