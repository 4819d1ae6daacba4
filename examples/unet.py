"""Small class-conditional U-Nets: denoisers with EDM's preconditioning, and the velocity of a flow.

They have the interface of EDM's networks (Karras et al. 2022): `net(x, sigma, class_labels)` returns the denoised images.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions with the noise level and the class as scale and shift between them."""

    def __init__(self, in_channels, out_channels, emb_channels, dropout):
        super().__init__()
        self.norm0 = nn.GroupNorm(8, in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, 2 * out_channels)
        self.norm1 = nn.GroupNorm(8, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv1.weight)
        nn.init.zeros_(self.conv1.bias)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(self.dropout(F.silu(self.norm1(h) * (1 + scale) + shift)))
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


class UNet(nn.Module):
    """Denoiser D(x, sigma) of images scaled to [-1, 1].

    Args:
        widths: channels at the full resolution, at half of it, and so on; multiples of 8.
        sigma_data: standard deviation of the data, of EDM's preconditioning.
        img_channels, img_resolution: of the images, the latter in pixels.
        label_dim: how many classes there are.
        dropout: the share of a block's features that training drops.
    """

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, widths, sigma_data, emb_channels, img_channels, img_resolution, label_dim, dropout=0.0):
        super().__init__()
        self.sigma_data, self.label_dim = sigma_data, label_dim
        self.img_channels, self.img_resolution = img_channels, img_resolution
        self.register_buffer("frequencies", torch.exp(torch.linspace(0.0, 5.0, 32)), persistent=False)
        self.embed_noise = nn.Linear(64, emb_channels)
        self.embed_class = nn.Linear(label_dim, emb_channels, bias=False)
        self.embed = nn.Linear(emb_channels, emb_channels)
        self.stem = nn.Conv2d(img_channels, widths[0], 3, padding=1)
        block = functools.partial(Block, emb_channels=emb_channels, dropout=dropout)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = widths[0], []
        for width in widths:
            self.down.append(nn.ModuleList([block(channels, width), block(width, width)]))
            channels = width
            skips.append(width)
        self.middle = nn.ModuleList([block(channels, channels), block(channels, channels)])
        self.attention = Attention(channels)
        for width in reversed(widths):
            self.up.append(nn.ModuleList([block(channels + skips.pop(), width), block(width, width)]))
            channels = width
        self.norm = nn.GroupNorm(8, channels)
        self.head = nn.Conv2d(channels, img_channels, 3, padding=1)

    def forward(self, x, sigma, class_labels=None):
        return self.denoised(x, sigma, class_labels)

    def denoised(self, x, sigma, class_labels=None):
        """Denoised images.

        Args:
            x: [batch, channels, height, width], clean images plus `sigma` times normal noise.
            sigma: [batch] or a number.
            class_labels: [batch, label_dim] one-hot rows, or None for the unconditional network.
        """
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        return c_skip * x + c_out * self.edm_output(x, sigma, class_labels)

    def edm_output(self, x, sigma, class_labels=None):
        """The output inside the preconditioning, of the same arguments: what a step of prediction_type "edm" takes."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
        c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()
        return self.raw(c_in * x, sigma.log() / 4, class_labels)

    def raw(self, x, noise_level, class_labels):
        """The network inside the preconditioning."""
        phase = noise_level.reshape(-1, 1) * self.frequencies
        emb = self.embed_noise(torch.cat([phase.cos(), phase.sin()], dim=1))
        if class_labels is not None:
            emb = emb + self.embed_class(class_labels.to(emb.dtype))
        emb = F.silu(self.embed(F.silu(emb))).expand(len(x), -1)
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


class FlowUNet(UNet):
    """Velocity noise - clean of a flow x = (1 - s) clean + s noise, s from 0 to 1: `net(x, s, class_labels)`."""

    edm_output = None

    def forward(self, x, s, class_labels=None):
        s = torch.as_tensor(s, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
        return self.raw(x, s, class_labels)

    def denoised(self, x, sigma, class_labels=None):
        """As `UNet.denoised`: x is clean + sigma noise, and s = sigma / (1 + sigma) the flow's place with that much noise."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
        s, x = sigma / (1 + sigma), x / (1 + sigma)
        return x - s * self(x, s, class_labels)
