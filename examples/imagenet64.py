"""The paper's headline, for who has EDM's published files: FID of 50,000 samples of ImageNet 64x64 with ER-SDE.

The paper (arXiv 2309.06169) gives 3.45 at 20 evaluations and 2.24 at 50. This command has not been run on the real files; on a small
network of the same interface the tests run all of it.

    git clone https://github.com/NVlabs/edm
    torchrun --nproc-per-node 8 examples/imagenet64.py --edm edm --network edm-imagenet-64x64-cond-adm.pkl \
        --detector inception-2015-12-05.pkl --ref imagenet-64x64.npz --out samples --steps 20 --method taylor

Without torchrun it runs in one process. What lies in --out is kept: a run that ended early goes on where it was, with any number of
processes. Every image and its class belong to its seed alone. The network and the detector are pickles, which run code when they
are opened: take them from NVIDIA's own pages, which the README of NVlabs/edm names.
"""

import argparse
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from ersde_fast import er_sde_plan
from ersde_fast.distributed import generate, load_samples
from ersde_fast.integrations.edm import class_labels_of, parse_seeds, to_pixels
from ersde_fast.schedules import karras_sigmas


def unpickled(path: Path, edm: Path | None):
    """What one of EDM's pickles holds; they need the modules of its repository."""
    sys.path += [str(edm)] if edm else []
    try:
        with open(path, "rb") as file:
            return pickle.load(file)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{path} needs the module {error.name}: name the folder of EDM's repository with --edm") from None


def asked_of(net):
    """A model, and what it predicts: of a network inside EDM's preconditioning (Karras et al. 2022, table 1) its raw output, from which
    the step itself makes the denoised images; of others, which have no sigma_data, those images."""
    if not hasattr(net, "sigma_data"):
        return net, None

    def raw_output(x, sigma, class_labels=None):
        sigma = sigma.reshape(-1, 1, 1, 1)
        scaled = x / (sigma**2 + net.sigma_data**2).sqrt()
        scaled = scaled.half() if getattr(net, "use_fp16", False) and x.is_cuda else scaled
        return net.model(scaled, sigma.flatten().log() / 4, class_labels=class_labels).to(x.dtype)

    return raw_output, "edm"


@torch.no_grad()
def statistics(detector, out: Path, seeds: list[int], size: int, batch: int, device) -> tuple[np.ndarray, np.ndarray]:
    """Mean [size] and covariance [size, size] of the detector's features over all samples, shared out over the processes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = seeds[len(seeds) * rank // world : len(seeds) * (rank + 1) // world]
    total = torch.zeros(size, dtype=torch.float64, device=device)
    squares = torch.zeros(size, size, dtype=torch.float64, device=device)
    batches = load_samples(out, share).split(batch) if share else ()
    for pixels in tqdm(batches, unit="batch", desc="features", disable=rank > 0):
        features = detector(pixels.to(device), return_features=True).double()
        total += features.sum(0)
        squares += features.T @ features
    if world > 1:
        dist.all_reduce(total)
        dist.all_reduce(squares)
    mean = total / len(seeds)
    return mean.cpu().numpy(), ((squares - torch.outer(mean, total)) / (len(seeds) - 1)).cpu().numpy()


def frechet(mean, covariance, ref_mean, ref_covariance) -> float:
    """FID (Heusel et al. 2017): the trace of a product's root is the sum of the roots of its eigenvalues."""
    roots = np.sqrt(np.linalg.eigvals(covariance @ ref_covariance).real.clip(min=0)).sum()
    return float(np.square(mean - ref_mean).sum() + np.trace(covariance) + np.trace(ref_covariance) - 2 * roots)


def main(arguments=None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True, type=Path, help="EDM's pickle of the network")
    parser.add_argument("--detector", required=True, type=Path, help="NVIDIA's pickle of Inception")
    parser.add_argument("--ref", required=True, type=Path, help="npz with mu and sigma of the data's features")
    parser.add_argument("--edm", type=Path, help="the folder of EDM's repository, which its pickles need")
    parser.add_argument("--out", required=True, type=Path, help="a folder for the samples")
    parser.add_argument("--seeds", type=parse_seeds, default=parse_seeds("0-49999"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="evaluations of the network")
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--method", choices=["newton", "taylor"], help="taylor is the paper's rule; default: the library's")
    parser.add_argument("--noise_scaler", default="sde_5")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
    net = unpickled(args.network, args.edm)["ema"].to(args.device).eval().requires_grad_(False)
    sigmas = karras_sigmas(args.steps, max(0.002, net.sigma_min), min(80.0, net.sigma_max), round_sigma=net.round_sigma)
    model, prediction_type = asked_of(net)
    options = {"order": args.order, "method": args.method, "noise_scaler": args.noise_scaler}
    plan = er_sde_plan(sigmas, sigma_data=getattr(net, "sigma_data", None), **options)
    generate(
        model,
        plan,
        args.seeds,
        (net.img_channels, net.img_resolution, net.img_resolution),
        args.out,
        args.batch,
        extra_args=lambda seeds: {"class_labels": class_labels_of(net, seeds, device=args.device)},
        transform=to_pixels,
        prediction_type=prediction_type,
        device=args.device,
    )
    detector = unpickled(args.detector, args.edm).to(args.device).eval()
    with np.load(args.ref) as ref:
        ref_mean, ref_covariance = ref["mu"], ref["sigma"]
    made = statistics(detector, args.out, args.seeds, len(ref_mean), args.batch, args.device)
    fid = frechet(*made, ref_mean, ref_covariance)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"FID {fid:.4f}  {len(args.seeds)} samples, {args.steps} evaluations, order {args.order}, {args.noise_scaler}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return fid


if __name__ == "__main__":
    main()
