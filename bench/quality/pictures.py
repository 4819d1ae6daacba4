"""The pictures that the study's networks are trained on: emoji of seven styles in colour, and Fashion-MNIST.

pip install resvg-py
python bench/quality/pictures.py        # fetches and renders both (npm, apt-get; a few minutes), and keeps them in out/pictures

bench/quality/weights/NOTICE names the authors and the licences.
"""

import gzip
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CACHE = Path(__file__).resolve().parents[2] / "out" / "pictures"
STYLES = {
    "noto": "1.2.9", "noto-v1": "1.2.5", "fxemoji": "1.2.2", "fluent-emoji": "1.2.7", "fluent-emoji-flat": "1.2.6",
    "twemoji": "1.2.5", "emojione": "1.2.3",
}  # fmt: skip
FASHION = Path("usr/share/datasets/fashion-mnist")


def pictures(name: str, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """The pictures to train on, or those held back from it.

    Args:
        name: "emoji" or "fashion".

    Returns:
        Images [n, 3 or 1, 32, 32] uint8, and their classes [n] int64: 7 styles, or Fashion-MNIST's 10.
    """
    path = CACHE / f"{name}.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; python bench/quality/pictures.py makes it")
    kept = np.load(path)
    mine = kept["held_out"] == held_out
    images = torch.from_numpy(kept["images"][mine])
    around = (32 - images.shape[-1]) // 2
    return F.pad(images, (around,) * 4), torch.from_numpy(kept["labels"][mine]).long()


def without_skin_tones(names) -> list[str]:
    """The names, less the variants of one picture in the colours of skin."""
    names = set(names)
    tone = re.compile(r"-(medium-light|medium-dark|medium|light|dark)(?=-|$)")

    def varies(name: str) -> bool:
        return any(name[: m.start()] + "-medium-dark" + name[m.end() :] in names for m in tone.finditer(name))

    return sorted(name for name in names if not re.search(r"skin-tone|-tone\d", name) and not varies(name))


def is_held_out(name: str) -> bool:
    """One name in twenty, the same in every style: a picture that the network has seen in another is not new to it."""
    return hashlib.sha256(name.replace("-", "").encode()).digest()[0] < 13


def render(icons: dict, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A set's pictures on white.

    Args:
        icons: the contents of its icons.json (https://iconify.design/docs/types/iconify-json.html).

    Returns:
        Images [n, 3, size, size] uint8, and whether each is held out [n] bool.
    """
    import resvg_py
    from PIL import Image

    shown = [name for name, icon in icons["icons"].items() if not icon.get("hidden")]
    names, images = without_skin_tones(shown), []
    for name in names:
        icon = icons["icons"][name]
        left, top, width, height = (
            icon.get(key, icons.get(key, default)) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        side = max(width, height)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{side}" height="{side}" '
            f'viewBox="{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
        images.append(np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB")).transpose(2, 0, 1))
    return np.stack(images), np.array([is_held_out(name) for name in names])


def fetch_icons(style: str, folder: Path) -> dict:
    """The contents of a set's icons.json, from its npm package."""
    subprocess.run(
        ["npm", "pack", "--silent", f"@iconify-json/{style}@{STYLES[style]}"], cwd=folder, check=True, capture_output=True
    )
    with tarfile.open(folder / f"iconify-json-{style}-{STYLES[style]}.tgz") as archive:
        return json.load(archive.extractfile("package/icons.json"))


def emoji(folder: Path) -> dict[str, np.ndarray]:
    parts = [render(fetch_icons(style, folder)) for style in STYLES]
    return {
        "images": np.concatenate([images for images, _ in parts]),
        "labels": np.repeat(np.arange(len(parts), dtype=np.uint8), [len(images) for images, _ in parts]),
        "held_out": np.concatenate([held for _, held in parts]),
    }


def fashion(folder: Path) -> dict[str, np.ndarray]:
    """From Debian's package, which need not be installed. Its own test set is what is held out."""
    root = Path("/")
    if not (root / FASHION).exists():
        subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=folder, check=True)
        subprocess.run(["dpkg", "-x", next(folder.glob("dataset-fashion-mnist*.deb")), folder], check=True)
        root = folder

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((root / FASHION / name).read_bytes()), np.uint8, offset=header)

    images, labels = (
        np.concatenate([read(f"{part}-{kind}-ubyte.gz", header) for part in ("train", "t10k")])
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return {"images": images.reshape(-1, 1, 28, 28), "labels": labels, "held_out": np.arange(len(labels)) >= 60_000}


def main():
    CACHE.mkdir(parents=True, exist_ok=True)
    for name, make in (("emoji", emoji), ("fashion", fashion)):
        with tempfile.TemporaryDirectory() as folder:
            made = make(Path(folder))
        np.savez_compressed(CACHE / f"{name}.npz", **made)
        held = made["held_out"]
        counts = [np.bincount(made["labels"][part]).tolist() for part in (~held, held)]
        scaled = made["images"] / np.float32(127.5) - 1
        print(
            f"{name}: {counts[0]} a class to train on, {counts[1]} held out; mean {scaled.mean():.2f}, std {scaled.std():.2f}"
        )


if __name__ == "__main__":
    main()
