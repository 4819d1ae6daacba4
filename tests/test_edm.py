"""Networks of EDM's kind: the schedule, the sampler, images that belong to their seeds, and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ersde_fast import portable_noise, sample_er_sde
from ersde_fast.integrations import edm

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


class Gaussian:
    """The exact denoiser of N(0.1 class, 0.5^2), known from sigma 0.01 to 50."""

    sigma_min, sigma_max, img_channels, img_resolution, label_dim = 0.01, 50.0, 3, 4, 10

    def __call__(self, x, sigma, class_labels=None):
        variance = sigma.view(-1, 1, 1, 1) ** 2
        mean = 0.1 * class_labels.argmax(1).view(-1, 1, 1, 1)
        return (variance * mean + 0.25 * x) / (variance + 0.25)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


def labels(*classes):
    return torch.nn.functional.one_hot(torch.tensor(classes), 10).float()


def test_schedule():
    """Equation 5 of the paper at its ends and in the middle, through the network's own rounding."""
    sigmas = edm.karras_sigmas(3)
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert sigmas.tolist() == pytest.approx([80, middle, 0.002, 0]) and sigmas.dtype == torch.float64
    assert edm.karras_sigmas(3, 0.6, 9.4, round_sigma=torch.round).tolist()[::2] == [9, 1]
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        edm.karras_sigmas(0)


def test_sampler_keeps_within_the_networks_levels():
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    result = edm.er_sde_sampler(Gaussian(), latents, labels(1, 2), num_steps=8, seed=5)
    sigmas = edm.karras_sigmas(8, 0.01, 50.0)
    expected = sample_er_sde(
        lambda x, s: Gaussian()(x, s, labels(1, 2)), 50 * latents, sigmas, disable=True, seed=5, guidance=1
    )
    assert torch.equal(result, expected)
    ones = edm.er_sde_sampler(Gaussian(), latents, labels(1, 2), randn_like=torch.ones_like, num_steps=8)
    assert not torch.equal(ones, expected) and ones.isfinite().all()


class Preconditioned(Gaussian):
    """The same in EDM's preconditioning: what the network inside would have to say."""

    sigma_data = 0.4

    def edm_output(self, x, sigma, class_labels=None):
        s = sigma.view(-1, 1, 1, 1)
        total = s**2 + self.sigma_data**2
        return (self(x, sigma, class_labels) - self.sigma_data**2 / total * x) * total.sqrt() / (s * self.sigma_data)


def test_the_raw_output_is_preconditioned_in_the_steps_pass():
    latents = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    settings = {"num_steps": 8, "seed": 5, "eta": [0, 1, 1, 0.5, 1, 0, 1, 0]}
    expected = edm.er_sde_sampler(Gaussian(), latents, labels(1, 2), **settings)
    result = edm.er_sde_sampler(Preconditioned(), latents, labels(1, 2), **settings)
    assert not torch.equal(result, expected)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


def images_of(seeds, batch_size):
    batches = edm.generate(Gaussian(), seeds, batch_size, progress=False)
    return {seed: image for batch, images in batches for seed, image in zip(batch, images, strict=True)}


def test_images_belong_to_their_seeds():
    """Whatever the batches, and whichever of them are made; the class too."""
    whole, again = images_of(range(10), 4), images_of([7, 3, 9], 2)
    assert list(whole) == list(range(10)) and all(torch.equal(again[s], whole[s]) for s in (7, 3, 9))
    start = portable_noise((1, 3, 4, 4), [3], step=-1)
    drawn = torch.randint(10, (), generator=torch.Generator().manual_seed(3)).item()
    assert torch.equal(edm.er_sde_sampler(Gaussian(), start, labels(drawn), seed=[3])[0], whole[3])
    ((_, of_class),) = edm.generate(Gaussian(), range(200), 200, class_index=6, num_steps=30, progress=False)
    assert of_class.mean().item() == pytest.approx(0.6, abs=5 * 0.5 / 9600**0.5)
    with pytest.raises(ValueError, match="class_index must be 0 to 9"):
        next(edm.generate(Gaussian(), [0], class_index=10))


def test_command_writes_images(tmp_path):
    """From a state and a config; the images of its sampler; shared out over processes they are the same files."""
    from digits_unet import DigitsUNet

    torch.manual_seed(0)
    net = DigitsUNet(widths=(8, 8, 8)).eval()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "net.json").write_text(json.dumps({"widths": [8, 8, 8]}))
    network = [
        "--network",
        "digits_unet:DigitsUNet",
        "--weights",
        tmp_path / "net.safetensors",
        "--config",
        tmp_path / "net.json",
    ]
    command = [
        sys.executable,
        "-m",
        "ersde_fast.integrations.edm",
        *network,
        "--seeds",
        "998-1000,5",
        "--steps",
        "4",
        "--eta",
        "0.5",
        "--subdirs",
    ]
    subprocess.run([*command, "--outdir", tmp_path / "one"], check=True, cwd=EXAMPLES)
    names = ["000000/000005.png", "000000/000998.png", "000000/000999.png", "001000/001000.png"]
    assert sorted(str(p.relative_to(tmp_path / "one")) for p in (tmp_path / "one").rglob("*.png")) == names
    with torch.no_grad():
        ((_, images),) = edm.generate(net, [998, 999, 1000, 5], num_steps=4, eta=0.5, progress=False)
    expected = (images[0, 0] * 127.5 + 128).clip(0, 255).to(torch.uint8)
    assert np.abs(np.asarray(Image.open(tmp_path / "one" / names[1])).astype(int) - expected.numpy()).max() <= 1
    for rank in "01":
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
        subprocess.run([*command, "--batch", "1", "--outdir", tmp_path / "two"], check=True, cwd=EXAMPLES, env=environment)
    for name in names:
        one, two = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "two"))
        assert np.abs(one - two).max() <= 1  # the network's arithmetic depends on the batch


def test_seeds():
    assert edm.parse_seeds("1,2,5-8") == [1, 2, 5, 6, 7, 8]
    with pytest.raises(Exception, match="seeds must be numbers"):
        edm.parse_seeds("1,b")


def test_network_is_named_by_module_and_class(tmp_path):
    with pytest.raises(ValueError, match='network must be "module:Class"'):
        edm.load_network("digits_unet", tmp_path / "net.safetensors")
