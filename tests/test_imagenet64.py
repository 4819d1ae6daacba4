"""The FID command end to end on a small network of EDM's interface: pickles, classes, several processes, resuming."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ersde_fast import portable_noise, sample_er_sde
from ersde_fast.distributed import load_samples
from ersde_fast.integrations.edm import to_pixels
from ersde_fast.schedules import karras_sigmas
from imagenet64 import asked_of

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "imagenet64.py"
EDM_REPOSITORY = '''
"""Stands for EDM's repository: the module that its pickles need."""
import torch

class Inside(torch.nn.Module):
    """What is left to say of N(class / 5 - 1, 0.5^2) in every pixel: of c_in x and c_noise, (denoised - c_skip x) / c_out."""
    def forward(self, scaled, noise, class_labels):
        assert noise.ndim == 1
        sigma = (4 * noise).exp().view(-1, 1, 1, 1)
        mean = (class_labels.argmax(1) / 5 - 1).view(-1, 1, 1, 1)
        total = sigma**2 + 0.4**2
        x = scaled * total.sqrt()
        denoised = (sigma**2 * mean + 0.25 * x) / (sigma**2 + 0.25)
        return (denoised - 0.4**2 / total * x) * total.sqrt() / (sigma * 0.4)

class Net(torch.nn.Module):
    """The network in its preconditioning, whose own denoised images nobody asks for."""
    img_channels, img_resolution, label_dim, sigma_min, sigma_max, sigma_data = 3, 8, 10, 0.01, 50.0, 0.4

    def __init__(self):
        super().__init__()
        self.model = Inside()

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

class Detector(torch.nn.Module):
    """The means of quarters of the image."""
    def forward(self, pixels, return_features):
        assert pixels.dtype == torch.uint8 and return_features
        return torch.nn.functional.avg_pool2d(pixels.float().mean(1, keepdim=True), 4).flatten(1) / 100
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """EDM's repository and pickles, and the exact statistics of its data."""
    tmp_path = tmp_path_factory.mktemp("imagenet64")
    (tmp_path / "edm").mkdir()
    (tmp_path / "edm" / "tiny_edm.py").write_text(EDM_REPOSITORY)
    save = "import pickle, tiny_edm; pickle.dump({'ema': tiny_edm.Net()}, open('net.pkl', 'wb'));"
    save += "pickle.dump(tiny_edm.Detector(), open('detector.pkl', 'wb'))"
    subprocess.run([sys.executable, "-c", save], cwd=tmp_path, env=os.environ | {"PYTHONPATH": "edm"}, check=True)
    return tmp_path


def run(folder, out, *more, processes=1, edm=True):
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable,
        *launch,
        SCRIPT,
        "--network",
        "net.pkl",
        "--detector",
        "detector.pkl",
        "--ref",
        "ref.npz",
        "--out",
        out,
    ]
    command += [*(["--edm", "edm"] if edm else []), "--device", "cpu", "--batch", "32", "--steps", "8", *more]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_end_to_end(files):
    np.savez(files / "ref.npz", mu=np.zeros(4), sigma=np.eye(4))
    first = run(files, "a", "--seeds", "0-99")
    assert first.returncode == 0, first.stderr
    images = load_samples(files / "a").float()
    assert images.shape == (100, 3, 8, 8)
    classes = [torch.randint(10, (), generator=torch.Generator().manual_seed(seed)).item() for seed in range(100)]
    brightness = images.mean((1, 2, 3))
    expected = (torch.tensor(classes) / 5 - 1) * 127.5 + 128
    assert ((brightness - expected).abs() < 40).all() and torch.corrcoef(torch.stack([brightness, expected]))[0, 1] > 0.95

    # From the network's raw output the step makes the denoised images that the data's exact denoiser gives.
    sigmas = karras_sigmas(8, 0.01, 50.0)
    means = (torch.tensor(classes) / 5 - 1).view(-1, 1, 1, 1)
    denoise = lambda x, sigma: (sigma.view(-1, 1, 1, 1) ** 2 * means + 0.25 * x) / (sigma.view(-1, 1, 1, 1) ** 2 + 0.25)  # noqa: E731
    start = 50 * portable_noise((100, 3, 8, 8), list(range(100)), step=-1)
    exact = to_pixels(sample_er_sde(denoise, start, sigmas, disable=True, max_stage=3, seed=list(range(100)))).float()
    assert (images - exact).abs().max() <= 1 and (images != exact).float().mean() < 1e-3

    # The exact statistics of these images are at distance 0; a mean that is moved by (1, 2, 2, 4) is at 25 from them.
    features = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4).flatten(1).double().numpy() / 100
    np.savez(files / "ref.npz", mu=features.mean(0) + np.array([1, 2, 2, 4]), sigma=np.cov(features.T))
    again = run(files, "a", "--seeds", "0-99")
    assert float(re.search(r"FID ([\d.]+)  100 samples, 8 evaluations", again.stdout)[1]) == pytest.approx(25, abs=1e-3)
    assert "100/100" in again.stderr and "samples" not in re.sub(r"100/100.*", "", again.stderr)

    # The rest of the seeds by two processes; they agree with one.
    (first_file, *_) = sorted((files / "a").glob("samples-*"))
    first_file.unlink()
    two = run(files, "a", "--seeds", "0-99", processes=2)
    assert two.returncode == 0, two.stderr
    assert torch.equal(load_samples(files / "a").float(), images)
    assert float(re.search(r"FID ([\d.]+)", two.stdout)[1]) == pytest.approx(25, abs=1e-3)


def test_a_network_of_another_preconditioning_is_asked_for_denoised_images():
    net = torch.nn.Identity()
    assert asked_of(net) == (net, None)


def test_without_the_repository_the_error_names_it(files):
    np.savez(files / "ref.npz", mu=np.zeros(4), sigma=np.eye(4))
    failed = run(files, "a", edm=False)
    assert (
        failed.returncode
        and "net.pkl needs the module tiny_edm: name the folder of EDM's repository with --edm" in failed.stderr
    )
