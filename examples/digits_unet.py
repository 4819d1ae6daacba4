"""The demo's denoiser: a small class-conditional U-Net of 28x28 handwritten digits with EDM preconditioning.

It has the interface of EDM's networks (Karras et al. 2022): `net(x, sigma, class_labels)` returns the denoised images.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("digits.safetensors")


class Block(nn.Module):
    """Two 3x3 convolutions with the noise level and the class as scale and shift between them."""

    def __init__(self, in_channels, out_channels, emb_channels):
        super().__init__()
        self.norm0 = nn.GroupNorm(8, in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, 2 * out_channels)
        self.norm1 = nn.GroupNorm(8, out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv1.weight)
        nn.init.zeros_(self.conv1.bias)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(h) * (1 + scale) + shift))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the positions of a feature map."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width).transpose(-1, -2)
        h = F.scaled_dot_product_attention(*qkv.unbind(1))
        return x + self.proj(h.transpose(-1, -2).reshape(b, c, height, width))


class DigitsUNet(nn.Module):
    """Denoiser D(x, sigma) of digits scaled to [-1, 1], from 28x28 down to 7x7 and back.

    Args:
        widths: channels at 28x28, 14x14 and 7x7.
        sigma_data: standard deviation of the data, of EDM's preconditioning.
    """

    label_dim = 10
    img_resolution, img_channels = 28, 1
    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, widths=(32, 64, 96), sigma_data=0.6, emb_channels=128):
        super().__init__()
        self.sigma_data = sigma_data
        self.register_buffer("frequencies", torch.exp(torch.linspace(0.0, 5.0, 32)), persistent=False)
        self.embed_noise = nn.Linear(64, emb_channels)
        self.embed_class = nn.Linear(self.label_dim, emb_channels, bias=False)
        self.embed = nn.Linear(emb_channels, emb_channels)
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = widths[0], []
        for width in widths:
            self.down.append(nn.ModuleList([Block(channels, width, emb_channels), Block(width, width, emb_channels)]))
            channels = width
            skips.append(width)
        self.middle = nn.ModuleList([Block(channels, channels, emb_channels), Block(channels, channels, emb_channels)])
        self.attention = Attention(channels)
        for width in reversed(widths):
            self.up.append(
                nn.ModuleList([Block(channels + skips.pop(), width, emb_channels), Block(width, width, emb_channels)])
            )
            channels = width
        self.norm = nn.GroupNorm(8, channels)
        self.head = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x, sigma, class_labels=None):
        """Denoised images.

        Args:
            x: [batch, 1, 28, 28], clean images plus `sigma` times normal noise.
            sigma: [batch] or a number.
            class_labels: [batch, 10] one-hot rows, or None for the unconditional network.
        """
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()
        phase = sigma.flatten().log()[:, None] / 4 * self.frequencies
        emb = self.embed_noise(torch.cat([phase.cos(), phase.sin()], dim=1))
        if class_labels is not None:
            emb = emb + self.embed_class(class_labels.to(emb.dtype))
        emb = F.silu(self.embed(F.silu(emb)))
        return c_skip * x + c_out * self.raw(c_in * x, emb.expand(len(x), -1))

    def raw(self, x, emb):
        """The network inside the preconditioning."""
        h, skips = self.stem(x), []
        for level, blocks in enumerate(self.down):
            if level:
                h = F.avg_pool2d(h, 2)
            for block in blocks:
                h = block(h, emb)
            skips.append(h)
        h = self.middle[1](self.attention(self.middle[0](h, emb)), emb)
        for level, blocks in enumerate(self.up):
            if level:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks:
                h = block(h, emb)
        return self.head(F.silu(self.norm(h)))

    def round_sigma(self, sigma):
        """EDM's interface: this network takes any sigma."""
        return torch.as_tensor(sigma)


def load_digits_unet(path=WEIGHTS):
    """The trained network, in float32, from the float16 weights beside this file."""
    from safetensors.torch import load_file

    net = DigitsUNet()
    net.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return net.eval().requires_grad_(False)
