"""ER-SDE for networks with the interface of EDM (Karras et al. 2022): `net(x, sigma, class_labels)` returns the denoised images.

    python -m ersde_fast.integrations.edm --network digits_unet:DigitsUNet --weights digits.safetensors --seeds 0-63 --outdir out

Every image belongs to its seed alone: the same in any batch, order and number of processes.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..draw import portable_noise
from ..sample import sample_er_sde
from ..schedules import karras_sigmas


@torch.no_grad()
def er_sde_sampler(
    net,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like=None,
    num_steps: int = 20,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    *,
    seed=None,
    max_stage: int | None = None,
    noise_scaler=None,
    method: str | None = None,
    node_scale: float | None = None,
    s_noise: float = 1.0,
    eta: float | Sequence[float] | Tensor = 1.0,
    guidance: float | None = None,
) -> Tensor:
    """Replaces EDM's `edm_sampler`, and takes its arguments.

    Args:
        net: the network; `sigma_min`, `sigma_max` and `round_sigma` bound the levels. Where it has `edm_output(x, sigma,
            class_labels)`, the output of the network inside EDM's preconditioning, and `sigma_data`, the denoised images are made of
            that in the step's own pass.
        latents: [batch, channels, height, width] standard normal.
        class_labels: [batch, label_dim], or None.
        randn_like: draws a step's noise from a tensor like it; with `seed` None and without it torch's own stream is drawn.
        seed: the portable stream for the steps' noise, see `ersde_fast.fast_step`.
        num_steps, sigma_min, sigma_max, rho: of `karras_sigmas`; the first is the evaluations of the network.
        max_stage, noise_scaler, method, node_scale, s_noise, eta: see `ersde_fast.sample_er_sde`.
        guidance: see there; where nothing is named None is 1, since EDM's networks are sampled without guidance.

    Returns:
        [batch, channels, height, width] the images.

    Raises:
        ValueError, TypeError: what `sample_er_sde` refuses.

    Source: arXiv 2206.00364 and its code, whose interface this is.
    """
    sigmas = karras_sigmas(num_steps, max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max), rho, net.round_sigma)
    if guidance is None and max_stage is None and method is None and node_scale is None:
        guidance = 1.0
    output = getattr(net, "edm_output", None)
    raw = {} if output is None else {"prediction_type": "edm", "sigma_data": net.sigma_data}
    model = net if output is None else output
    return sample_er_sde(
        lambda x, sigma: model(x, sigma, class_labels), sigmas[0].item() * latents, sigmas, disable=True, s_noise=s_noise, **raw,
        noise_sampler=None if randn_like is None else lambda sigma, sigma_next: randn_like(latents), noise_scaler=noise_scaler,
        max_stage=max_stage, method=method, node_scale=node_scale, eta=eta, guidance=guidance, seed=seed,
    )  # fmt: skip


def generate(
    net,
    seeds: Sequence[int],
    batch_size: int = 64,
    class_index: int | None = None,
    device="cpu",
    progress: bool = True,
    **sampler,
) -> Iterator[tuple[list[int], Tensor]]:
    """Images of seeds, batch by batch: (the batch's seeds, [batch, channels, height, width] images in about [-1, 1]).

    Args:
        net: the network, as for `er_sde_sampler`; `img_channels` and `img_resolution` say the shape of an image.
        seeds: one for each image.
        batch_size: images that are computed together.
        class_index: the class of every image; None draws one from each image's seed, for networks of classes.
        device: of the network.
        progress: shows a progress bar.
        sampler: further arguments of `er_sde_sampler`.

    Returns:
        An iterator over the batches.

    Raises:
        ValueError, TypeError: a class that the network has not, and what `er_sde_sampler` refuses.

    Source: the command `generate` of EDM's code.
    """
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    for start in tqdm(range(0, len(seeds), batch_size), unit="batch", disable=not progress):
        batch = list(seeds[start : start + batch_size])
        latents = portable_noise((len(batch), *shape), batch, step=-1, device=device)
        class_labels = class_labels_of(net, batch, class_index, device)
        yield batch, er_sde_sampler(net, latents, class_labels, seed=batch, **sampler)


def class_labels_of(net, seeds: Sequence[int], class_index: int | None = None, device="cpu") -> Tensor | None:
    """One-hot rows [len(seeds), label_dim] of the class, or of those that the seeds draw; None for a network without classes."""
    labels = getattr(net, "label_dim", 0)
    if class_index is not None and not 0 <= class_index < labels:
        raise ValueError(f"class_index must be 0 to {labels - 1} for this network, got {class_index}")
    if not labels:
        return None
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    drawn = [torch.randint(labels, (), generator=generator, device="cpu").item() for generator in generators]
    classes = drawn if class_index is None else [class_index] * len(seeds)
    return torch.nn.functional.one_hot(torch.tensor(classes, device=device), labels).float()


def to_pixels(images: Tensor) -> Tensor:
    """uint8 of images in [-1, 1], rounded as EDM's generate does."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def save_images(images: Tensor, seeds: Sequence[int], outdir: Path, subdirs: bool = False) -> None:
    """Writes outdir/000123.png, or outdir/000000/000123.png with `subdirs`, of images in [-1, 1], as EDM's generate does."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('writing images needs pillow: pip install "ersde-fast[edm]"') from error

    pixels = to_pixels(images).permute(0, 2, 3, 1).cpu().numpy()
    for seed, pixel in zip(seeds, pixels, strict=True):
        folder = outdir / f"{seed - seed % 1000:06d}" if subdirs else outdir
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixel[..., 0] if pixel.shape[-1] == 1 else pixel).save(folder / f"{seed:06d}.png")


def load_network(network: str, weights: Path, config: Path | None = None) -> torch.nn.Module:
    """A network from its class and a safetensors file of its state.

    Args:
        network: "module:Class".
        weights: the state, of any float dtype; loaded as float32.
        config: a JSON file of the class's keyword arguments.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError('loading a network needs safetensors: pip install "ersde-fast[edm]"') from error

    module, _, name = network.partition(":")
    if not name:
        raise ValueError(f'network must be "module:Class", got {network!r}')
    net = getattr(importlib.import_module(module), name)(**(json.loads(Path(config).read_text()) if config else {}))
    net.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in load_file(weights).items()}
    )
    return net.eval().requires_grad_(False)


def parse_seeds(text: str) -> list[int]:
    """Seeds of "1,2,5-10"."""
    seeds = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            seeds.extend(range(int(first), int(last or first) + 1))
        except ValueError:
            raise argparse.ArgumentTypeError(f'seeds must be numbers and ranges such as "1,2,5-10", got {text!r}') from None
    return seeds


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Under torchrun every process takes its share of the seeds."""
    parser = argparse.ArgumentParser(prog="python -m ersde_fast.integrations.edm", description=__doc__.split("\n")[0])
    parser.add_argument("--network", required=True, help="module:Class")
    parser.add_argument("--weights", required=True, type=Path, help="safetensors file of the network's state")
    parser.add_argument("--config", type=Path, help="JSON file of the class's keyword arguments")
    parser.add_argument("--outdir", required=True, type=Path)
    parser.add_argument("--seeds", type=parse_seeds, default=parse_seeds("0-63"), help="such as 1,2,5-10 (default 0-63)")
    parser.add_argument("--subdirs", action="store_true", help="a folder for every 1000 seeds")
    parser.add_argument("--class", dest="class_index", type=int, help="of every image; default: drawn from its seed")
    parser.add_argument("--batch", type=int, default=64, help="largest batch (default 64)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20, help="evaluations of the network (default 20)")
    parser.add_argument("--sigma_min", type=float, default=0.002)
    parser.add_argument("--sigma_max", type=float, default=80.0)
    parser.add_argument("--rho", type=float, default=7.0)
    parser.add_argument("--order", type=int)
    parser.add_argument("--noise_scaler", default="sde_5")
    parser.add_argument("--eta", type=float, default=1.0, help="strength of the noise scaler (default 1)")
    parser.add_argument("--method", choices=["newton", "taylor"])
    parser.add_argument("--node_scale", type=float)
    parser.add_argument("--guidance", type=float, help="at which the network guides itself; default: none")
    args = parser.parse_args(arguments)

    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda" and processes > 1:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    sys.path.insert(0, "")  # the network's module may lie in this folder
    net = load_network(args.network, args.weights, args.config).to(args.device)
    batches = generate(
        net, args.seeds[rank::processes], args.batch, args.class_index, args.device, progress=rank == 0, num_steps=args.steps,
        sigma_min=args.sigma_min, sigma_max=args.sigma_max, rho=args.rho, max_stage=args.order, noise_scaler=args.noise_scaler,
        method=args.method, node_scale=args.node_scale, eta=args.eta, guidance=args.guidance,
    )  # fmt: skip
    for seeds, images in batches:
        save_images(images, seeds, args.outdir, args.subdirs)


if __name__ == "__main__":
    main()
