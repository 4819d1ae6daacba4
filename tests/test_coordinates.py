"""The coordinates in which a fit sees samples: linear, of the samples' norm, Fourier's where neighbours are alike, and fewer where many are."""

import math

import pytest
import torch

from ersde_fast.coordinates import FAINT, Coordinates, sharpness

SHAPES = [(7,), (1,), (3, 9), (9, 3), (4, 4), (1, 8, 8), (3, 7, 5), (3, 6, 1), (4, 1, 1), (2, 3, 6, 8)]
CPU = torch.device("cpu")
ALL = 10**9


def samples(shape, count=5, dtype=torch.float64, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_and_products_are_those_of_the_samples(shape):
    x, coordinates = samples(shape), Coordinates(shape, ALL, CPU)
    seen = coordinates.of(x)
    assert seen.shape[1] <= 2 * math.prod(shape) and seen.dtype == torch.float64
    torch.testing.assert_close(seen @ seen.T, x.flatten(1) @ x.flatten(1).T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_linear(shape):
    x, y, coordinates = samples(shape), samples(shape, seed=1), Coordinates(shape, 20, CPU)
    torch.testing.assert_close(coordinates.of(2 * x - y), 2 * coordinates.of(x) - coordinates.of(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_transformed_in_float32(dtype):
    x, coordinates = samples((3, 8, 8), dtype=dtype), Coordinates((3, 8, 8), ALL, CPU)
    torch.testing.assert_close(coordinates.of(x), coordinates.of(x.double()), rtol=0, atol=1e-5)


def test_without_neighbours_they_are_the_numbers():
    x = samples((7,))
    assert torch.equal(Coordinates((7,), ALL, CPU).of(x), x)
    assert torch.equal(sharpness(Coordinates((7,), ALL, CPU).variances(x)), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(7,), (3, 1, 1)], ids=str)
def test_what_has_no_neighbours_is_not_transformed(shape, monkeypatch):
    """A transform of every single number is 20 times the time of all the rest."""
    coordinates, x = Coordinates(shape, ALL, CPU), samples(shape, dtype=torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(torch.fft, "rfft2", None)
        seen, variances = coordinates.of(x), coordinates.variances(x)
    assert torch.equal(seen, x.double().flatten(1))
    torch.testing.assert_close(variances.mean(), seen.var(0, correction=0).mean())


def test_a_sequence_may_lie_along_either_axis():
    x = samples((9, 3))
    along, across = (Coordinates(shape, ALL, CPU).of(v) for shape, v in (((9, 3), x), ((3, 9), x.mT)))
    assert torch.equal(along, across)


@pytest.mark.parametrize("shape", [(3, 64, 64), (40, 500), (20_000,)], ids=str)
def test_of_many_numbers_some_are_kept_and_the_norm_in_the_mean(shape):
    """Of samples in which coarse frequencies have most, as in pictures."""
    x = samples(shape, 40)
    for axis in range(max(2, len(shape) - 1), len(shape) + 1) if len(shape) > 1 else ():
        x = x.cumsum(axis)
    wanted = 2000
    seen = Coordinates(shape, wanted, CPU).of(x)
    assert abs(seen.shape[1] - wanted) < 5 * math.sqrt(wanted)
    assert (seen.square().sum() / x.square().sum()).item() == pytest.approx(1, abs=0.05)


def test_the_coarsest_are_kept():
    coordinates = Coordinates((1, 64, 64), 300, CPU)
    flat = torch.ones(1, 1, 64, 64, dtype=torch.float64)
    assert coordinates.of(flat).square().sum().item() == pytest.approx(64 * 64, rel=1e-12)


def test_variances_are_those_of_the_frequencies():
    """Of noise one everywhere; of a wave all of it at the wave's frequency."""
    coordinates = Coordinates((1, 8, 8), ALL, CPU)
    noise = coordinates.variances(samples((1, 8, 8), 4000))
    torch.testing.assert_close(noise, torch.ones_like(noise), rtol=0.1, atol=0)
    wave = (2 * math.pi * 2 * torch.arange(8, dtype=torch.float64) / 8).cos().expand(2, 1, 8, 8)
    x = wave * torch.tensor([-3.0, 3.0], dtype=torch.float64)[:, None, None, None]
    there = coordinates.of(x)[0].abs() > 1e-10
    assert there.sum() == 1
    assert coordinates.variances(x)[there].item() == pytest.approx(9 * 64 / 4)  # its conjugate has as much


def test_what_is_faint_is_sharpened_no_more():
    """Noise is not."""
    noise = Coordinates((3, 16, 16), ALL, CPU).variances(samples((3, 16, 16), 4000))
    torch.testing.assert_close(sharpness(noise), torch.ones_like(noise), rtol=0.03, atol=0)
    variances = torch.tensor([2.0, 1.0, 1e-9, 0.0], dtype=torch.float64)
    sharp = sharpness(variances)
    assert sharp[2] == sharp[3] == FAINT**-0.25 and (sharp[1] / sharp[0]).item() == pytest.approx(2**0.25)


@pytest.mark.gpu
def test_on_a_gpu():
    x, shape = samples((3, 16, 16)), (3, 16, 16)
    there, here = Coordinates(shape, 200, torch.device("cuda")), Coordinates(shape, 200, CPU)
    torch.testing.assert_close(there.of(x.cuda()), here.of(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(there.variances(x.cuda()), here.variances(x), rtol=1e-12, atol=1e-12)
