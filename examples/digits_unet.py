"""The demo's denoiser: a small class-conditional U-Net of 28x28 handwritten digits with EDM preconditioning."""

from pathlib import Path

from unet import UNet

WEIGHTS = Path(__file__).with_name("digits.safetensors")


class DigitsUNet(UNet):
    """`UNet` of digits scaled to [-1, 1], from 28x28 down to 7x7 and back."""

    def __init__(self, widths=(32, 64, 96), sigma_data=0.6, emb_channels=128):
        super().__init__(widths, sigma_data, emb_channels, img_channels=1, img_resolution=28, label_dim=10)


def load_digits_unet(path=WEIGHTS):
    """The trained network, in float32, from the float16 weights beside this file."""
    from safetensors.torch import load_file

    net = DigitsUNet()
    net.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return net.eval().requires_grad_(False)
