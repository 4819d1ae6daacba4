"""The study's trained networks: their pictures, their weights of 8 bits, their denoisers, and a step of their training."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch

import pictures
import train
import trained
from unet import FlowUNet, UNet

SMALL = dict(widths=(8, 16), sigma_data=0.5, emb_channels=16, img_channels=1, img_resolution=32, label_dim=3, dropout=0.1)


def small(kind=UNet, seed=0):
    """A network whose every weight is at work, unlike an untrained one's."""
    torch.manual_seed(seed)
    net = kind(**SMALL).eval().requires_grad_(False)
    for p in net.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return net


def test_skin_tones_are_left_out():
    tones = [f"child-{tone}" for tone in ("light", "medium-light", "medium", "medium-dark", "dark")]
    tones += [f"man-{tone}-beard" for tone in ("light", "medium-light", "medium", "medium-dark", "dark")]
    kept = ["black-medium-square", "child", "man-beard", "police-car", "police-car-light", "traffic-light"]
    names = [*kept, *tones, "hand-medium-dark-skin-tone", "hand-dark-skin-tone-light-skin-tone", "man-climbing-tone1"]
    assert pictures.without_skin_tones(names) == kept


def test_split_is_by_name():
    """Stable, the same however a set spells a name, and about one in twenty."""
    names = [f"icon-{i}" for i in range(2000)]
    held = [name for name in names if pictures.is_held_out(name)]
    assert held[:3] == ["icon-115", "icon-119", "icon-120"] and 60 < len(held) < 140
    assert all(pictures.is_held_out(name.replace("-", "")) for name in held)


def test_pictures_are_rendered_on_white():
    pytest.importorskip("resvg_py")
    body = '<path fill="#f00" d="M0 0h8v16H0z"/>'
    icons = {"width": 16, "height": 16, "icons": {f"icon-{i}": {"body": body} for i in range(20)}}
    icons["icons"]["icon-0"]["hidden"] = True
    icons["icons"]["icon-1"].update(width=32)  # half as high as wide: white above and below
    images, held = pictures.render(icons)
    names = sorted(set(icons["icons"]) - {"icon-0"})
    assert images.shape == (19, 3, 32, 32) and images.dtype == np.uint8
    assert held.tolist() == [pictures.is_held_out(name) for name in names]
    halves = images[names.index("icon-2")]
    assert (halves[:, :, :16] == [[[255]], [[0]], [[0]]]).all() and (halves[:, :, 16:] == 255).all()
    wide = images[names.index("icon-1")]
    assert (wide[:, :8] == 255).all() and (wide[1:, 8:24, :8] == 0).all() and (wide[:, 24:] == 255).all()


@pytest.mark.parametrize("kind", [UNet, FlowUNet])
def test_weights_of_8_bits(kind, tmp_path, monkeypatch):
    """Each weight within half a step of its channel's scale, vectors exactly; a saved network computes with those."""
    net = small(kind)
    net.embed.weight[3] = 0
    state = net.state_dict()
    restored = trained.dequantise(trained.quantise(state))
    assert restored.keys() == state.keys()
    for name, value in state.items():
        if value.ndim > 1:
            bound = value.flatten(1).abs().amax(1) / 127 * 0.5001
            assert ((restored[name] - value).flatten(1).abs().amax(1) <= bound).all(), name
        else:
            assert torch.equal(restored[name], value), name
    monkeypatch.setattr(trained, "NETWORKS", {"small": (kind, SMALL)})
    trained.save(net, "small", {"steps": 1}, tmp_path)
    net.load_state_dict(restored)
    x, labels = torch.randn(3, 1, 32, 32), torch.eye(3)
    assert torch.equal(trained.load("small", tmp_path).denoised(x, 2.0, labels), net.denoised(x, 2.0, labels))


def test_flow_denoises_what_it_transports():
    """Clean images from a velocity: at sigma the flow is at s = sigma / (1 + sigma), and x_flow = (1 - s) x."""
    net = small(FlowUNet)
    x, sigma = torch.randn(2, 1, 32, 32), torch.tensor([0.5, 3.0])
    s = (sigma / (1 + sigma))[:, None, None, None]
    velocity = net((1 - s) * x, s)
    torch.testing.assert_close(net.denoised(x, sigma), (1 - s) * x - s * velocity)


def test_guidance():
    """Without effect at 1 and towards the class above; a network told no class is one told none of them."""
    net = small()
    x, labels = torch.randn(3, 1, 32, 32), torch.eye(3)
    of_class, plain = net.denoised(x, 2.0, labels), net.denoised(x, 2.0)
    torch.testing.assert_close(plain, net.denoised(x, 2.0, torch.zeros(3, 3)))
    assert torch.equal(trained.guided(net, labels, 1)(x, 2.0), of_class)
    torch.testing.assert_close(trained.guided(net, labels, 5.0)(x, 2.0) - plain, 5 * (of_class - plain))


@pytest.mark.parametrize("kind", [UNet, FlowUNet])
def test_training(kind, tmp_path, monkeypatch):
    """A few steps teach a network that knew nothing; what they write loads."""
    g = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.uint8) % 3
    images = (labels[:, None, None, None] * 100 + g.integers(0, 50, (60, 1, 28, 28))).astype(np.uint8)
    np.savez(tmp_path / "small.npz", images=images, labels=labels, held_out=np.arange(60) % 5 == 0)
    monkeypatch.setattr(pictures, "CACHE", tmp_path)
    monkeypatch.setattr(trained, "NETWORKS", {"small": (kind, SMALL)})
    monkeypatch.setattr(train, "DRAWS", 24)
    monkeypatch.setattr(train, "write_grid", functools.partial(train.write_grid, columns=2, num_steps=3))
    held_images, held_labels = pictures.pictures("small", held_out=True)
    held = held_images, torch.eye(3)[held_labels]
    torch.manual_seed(0)
    untrained = train.evaluate(trained.build("small").eval(), *held)
    monkeypatch.setattr(train, "monotonic", itertools.count().__next__)  # a second a step
    train.train("small", 24.0, 8, 0.1, "cpu", tmp_path, save_every=15.0)
    kept = json.loads((tmp_path / "small.json").read_text())
    net = trained.load("small", tmp_path)
    assert kept["loss"]["held out, 8 bits"] == pytest.approx(train.evaluate(net, *held), rel=1e-4)
    assert 20 < kept["steps"] < 24 and kept["loss"]["held out"] < 0.8 * untrained
    assert kept["loss"]["held out, 8 bits"] == pytest.approx(kept["loss"]["held out"], rel=0.05)
    assert (tmp_path / "small.png").stat().st_size > 0
