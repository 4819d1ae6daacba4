"""The study's own networks, which train.py trains: their sizes, and weights of 8 bits with a scale an output channel."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from unet import FlowUNet, UNet

WEIGHTS = Path(__file__).with_name("weights")
FASHION = dict(
    widths=(48, 80, 128), sigma_data=0.66, emb_channels=128, img_channels=1, img_resolution=32, label_dim=10, dropout=0.05
)
NETWORKS = {
    "emoji": (UNet, dict(
        widths=(96, 160, 224), sigma_data=0.58, emb_channels=256, img_channels=3, img_resolution=32, label_dim=7, dropout=0.15
    )),
    "fashion": (UNet, FASHION),
    "fashion_flow": (FlowUNet, FASHION),
}  # fmt: skip


def build(name: str) -> UNet:
    """The untrained network."""
    kind, sizes = NETWORKS[name]
    return kind(**sizes)


def quantise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and convolutions as int8 with `.scale`, float32 [output channels], beside them; vectors as they are."""
    small = {}
    for name, value in state.items():
        if value.ndim > 1:
            scale = (value.flatten(1).abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            small[name] = (value / scale.view(-1, *[1] * (value.ndim - 1))).round().to(torch.int8).contiguous()
            small[name + ".scale"] = scale
        else:
            small[name] = value
    return small


def dequantise(small: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 state that `quantise` was given, each weight within half its channel's scale."""
    state = {}
    for name, value in small.items():
        if value.dtype == torch.int8:
            state[name] = value.float() * small[name + ".scale"].view(-1, *[1] * (value.ndim - 1))
        elif not name.endswith(".scale"):
            state[name] = value
    return state


def save(net: UNet, name: str, report: dict, folder: Path) -> None:
    """Writes NAME.safetensors and, of how it was trained and what it reached, NAME.json."""
    from safetensors.torch import save_file

    save_file({key: value.cpu() for key, value in quantise(net.state_dict()).items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def load(name: str, folder: Path = WEIGHTS) -> UNet:
    """The trained network, float32.

    `net.denoised(x, sigma, class_labels)` takes clean + sigma noise, [batch, channels, 32, 32], of images in [-1, 1], and one-hot
    classes or None; "fashion_flow" itself, `net(x, s, class_labels)`, is the velocity of a flow.
    """
    from safetensors.torch import load_file

    net = build(name)
    net.load_state_dict(dequantise(load_file(folder / f"{name}.safetensors")))
    return net.eval().requires_grad_(False)


def guided(net: UNet, class_labels: Tensor, guidance: float):
    """`denoise(x, sigma)`: the prediction without classes plus `guidance` times what the class changes in it."""

    def denoise(x, sigma):
        of_class = net.denoised(x, sigma, class_labels)
        if guidance == 1:
            return of_class
        plain = net.denoised(x, sigma)
        return plain + guidance * (of_class - plain)

    return denoise
