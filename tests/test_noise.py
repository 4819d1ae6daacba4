"""The portable stream: its golden bits from every implementation, what it depends on, and that it is normal."""

import functools
import json
import math
import struct
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ersde_fast import portable_noise, torch_noise
from ersde_fast.backends import CPU
from ersde_fast.noise import box_muller, is_torch_stream, philox, seed_table, specified_noise

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("portable_noise.json").read_text())
EDGE_WORDS = sorted(
    {(w + d) % 2**32 for w in [0, *(2**p for p in range(33)), 0xAAAAAAAB, 0x55555555] for d in (-2, -1, 0, 1, 2)}
)


def bits(z):
    return z.contiguous().view(torch.int32)


def hex_bits(words):
    return torch.tensor([int(h, 16) for h in words]).to(torch.uint32).view(torch.int32)


# ---- the oracle: plain Python, one number at a time ----


def fma(a, b, c):
    """Correctly rounded float32 a b + c: the product is exact in Python's float, the sum is rounded once by Fraction."""
    return round_float32(Fraction(a) * Fraction(b) + Fraction(c))


def round_float32(exact):
    """The float32 nearest to a rational, ties to even; no subnormals occur."""
    if exact == 0:
        return 0.0
    magnitude, exponent = abs(exact), 0
    exponent = math.floor(math.log2(float(magnitude)))
    exponent += (magnitude >= 2 ** (exponent + 1)) - (magnitude < 2**exponent)
    unit = 2.0 ** (exponent - 23)
    return math.copysign(float(round(magnitude / unit.as_integer_ratio()[0] * unit.as_integer_ratio()[1]) * unit), exact)


def oracle(seed, step, sample, element):
    """One normal, as the specification reads."""
    group = element // 4
    c = [group % 2**32, step % 2**32, sample % 2**32, (group >> 32) << 24 | 1 << 16 | sample >> 32]
    k0, k1 = seed % 2**32, (seed >> 32) % 2**32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 % 2**32, (p0 >> 32) ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    half = element % 4 // 2 * 2
    return oracle_box_muller(c[half], c[half + 1])[element % 2]


def oracle_box_muller(a, b):
    to_float = lambda w: struct.unpack("<f", struct.pack("<I", w))[0]  # noqa: E731
    to_bits = lambda f: struct.unpack("<I", struct.pack("<f", f))[0]  # noqa: E731
    x = round_float32(round_float32(a) + 0.5)
    e = (to_bits(x) - 0x4F2AAAAB) & 0xFF800000
    f = to_float((to_bits(x) - e - 0x10000000) % 2**32) - 1.0
    p = to_float(0xBE99E978)
    for w in (0x3E9C2A6D, 0xBE8CD34E, 0x3EA872CA, 0xBECD1B0D, 0x3F0006C3, 0xBF2AA9E8, 0x3F800000, 0xC0000000):
        p = fma(p, f, to_float(w))
    k = float(e - 2**32 if e >= 2**31 else e)
    square = fma(p, f, fma(k, to_float(0xB4317218), to_float(0x2B800000)))
    r = struct.unpack("<f", struct.pack("<f", math.sqrt(square)))[0]
    t = (4 * b + 2) % 2**32
    t = round_float32(float(t - 2**32 if t >= 2**31 else t)) * 2.0**-32
    q = round_float32(t * t)
    s = to_float(0xBB998CC7)
    for w in (0x3DA34052, 0xBF255E12, 0x3FC90FDB):
        s = fma(s, q, to_float(w))
    s = round_float32(s * t)
    cosine = to_float(0xBCA73C5F)
    for w in (0x3E81D82C, 0xBF9DE9CE, 0x3F800000):
        cosine = fma(cosine, q, to_float(w))
    r = -r if b >= 2**31 else r
    first, second = (s, cosine) if b & 2**30 else (cosine, s)
    return round_float32(r * first), round_float32(r * second)


# ---- implementations ----


@pytest.fixture(params=["specification", "plain", "x86-64-v3", "x86-64-v4"])
def draw(request):
    """portable_noise by each implementation."""
    if request.param == "specification":
        yield lambda shape, seed, step=0: specified_noise(shape, seed_table(seed, shape[0] if shape else 1), step)
        return
    if not CPU.kernels.use_instruction_set(["", "plain", "x86-64-v3", "x86-64-v4"].index(request.param)):
        yield lambda shape, seed, step=0: portable_noise(shape, seed, step)  # what this machine has in its place
        return
    assert CPU.kernels.instruction_set() == request.param
    yield lambda shape, seed, step=0: portable_noise(shape, seed, step)
    CPU.kernels.use_instruction_set(0)


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda run: f"{run['seed']}-{run['step']}-{run['sample']}-{run['first']}")
def test_golden_runs(draw, run):
    n, seed = run["n"], [(run["seed"], run["sample"])]
    if run["first"] > 10**6:  # only a shard reaches there
        z = specified_noise((1, n), seed_table(seed, 1), run["step"], (2**42,), (run["first"],))[0]
    else:
        z = draw((1, run["first"] + n), seed, run["step"])[0, run["first"] :]
    if run["normals"] is not None:
        assert torch.equal(bits(z), hex_bits(run["normals"]))
    assert z.double().sum().item() == pytest.approx(run["sum"], rel=1e-13)
    assert z.double().square().sum().item() == pytest.approx(run["sumsq"], rel=1e-13)


@pytest.mark.parametrize("block", GOLDEN["blocks"], ids=lambda block: block["seed"])
def test_golden_blocks(block):
    seed = int(block["seed"], 16)
    counter = tuple(torch.tensor([int(w, 16)]) for w in block["counter"])
    words = philox((seed & 0xFFFFFFFF, seed >> 32), counter)
    assert [int(w) for w in words] == [int(w, 16) for w in block["words"]]
    normals = torch.cat([*box_muller(*words[:2]), *box_muller(*words[2:])])
    assert (
        bits(normals).tolist()
        == torch.tensor([int(h, 16) for h in block["normals"]]).to(torch.uint32).view(torch.int32).tolist()
    )


@pytest.mark.parametrize("pair", GOLDEN["box_muller"], ids=lambda pair: pair["a"] + pair["b"])
def test_golden_box_muller(pair):
    z = torch.stack(box_muller(torch.tensor(int(pair["a"], 16)), torch.tensor(int(pair["b"], 16))))
    assert torch.equal(bits(z), hex_bits(pair["normals"]))


@pytest.mark.parametrize(
    "key, counter, words",
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key, counter, words):
    """Random123's kat_vectors for philox4x32-10."""
    assert tuple(int(w) for w in philox(key, tuple(torch.tensor(c) for c in counter))) == words


def test_oracle_agrees(draw):
    seed, sample, n = 0x123456789ABCDEF0, (7 << 32) + 5, 203
    z = draw((1, n), [(seed, sample)], 41)[0]
    assert z.tolist() == [oracle(seed, 41, sample, e) for e in range(n)]


@functools.cache
def many_normals():
    return specified_noise((4, 2_500_000), seed_table(MANY_SEEDS, 4), -1)


MANY_SEEDS = [(99, 0), (2**64 - 1, 2**48 - 1), (0, 1 << 32), (2**63, 12345)]


def test_every_implementation_gives_the_same_bits_over_many_counters(draw):
    """10^7 normals, in samples of odd numbers, seeds and step."""
    assert torch.equal(bits(draw((4, 2_500_000), MANY_SEEDS, -1)), bits(many_normals()))


@pytest.mark.parametrize("implementation", [box_muller, "plain", "x86-64-v3", "x86-64-v4"])
def test_edge_words(implementation):
    """Words at every power of two and every branch, against the oracle; and every pair of them, against the specification."""
    a, b = (w.flatten() for w in torch.meshgrid(torch.tensor(EDGE_WORDS), torch.tensor(EDGE_WORDS), indexing="ij"))
    specified = torch.stack(box_muller(a, b))
    if implementation is box_muller:
        assert specified.abs().max() < 6.77
        for n in range(0, len(a), 41):
            assert specified[:, n].tolist() == list(oracle_box_muller(a[n].item(), b[n].item()))
    elif CPU.kernels.use_instruction_set(["", "plain", "x86-64-v3", "x86-64-v4"].index(implementation)):
        assert torch.equal(bits(CPU.kernels.box_muller(a, b)), bits(specified))
        CPU.kernels.use_instruction_set(0)


# ---- what it depends on ----


def test_a_batch_is_its_samples():
    shape = (3, 5, 7)
    whole = portable_noise(shape, 42, step=3)
    assert torch.equal(whole, portable_noise(shape, [(42, 0), (42, 1), (42, 2)], step=3))
    assert torch.equal(whole[2:], portable_noise((1, 5, 7), [(42, 2)], step=3))
    assert torch.equal(whole[[2, 0]], portable_noise((2, 5, 7), [(42, 2), (42, 0)], step=3))
    assert torch.equal(portable_noise(shape, [5, 6, 7])[1], portable_noise((1, 5, 7), 6)[0])


def test_shape_and_dtype_do_not_matter():
    z = portable_noise((1, 35), 42)
    assert torch.equal(portable_noise((1, 5, 7), 42).flatten(), z.flatten())
    assert torch.equal(portable_noise((1, 35), 42, dtype=torch.bfloat16), z.bfloat16())
    assert torch.equal(portable_noise((), 42), z[0, 0])
    assert torch.equal(portable_noise((1, 9), 42), z[:, :9])
    assert portable_noise((0, 4), 42).shape == (0, 4) and portable_noise((2, 0), 42).shape == (2, 0)


def test_a_tensor_of_pairs_is_the_table():
    """Without a loop over the batch."""
    pairs = torch.tensor([[-5, 0], [7, 2**48 - 1]])
    assert seed_table(pairs, 2) is pairs
    with pytest.raises(ValueError, match=r"seed must have samples from 0 to 2\^48 - 1, got -1 in \(3, -1\)"):
        seed_table(torch.tensor([[3, -1], [3, 0]]), 2)


def test_seed_and_step_wrap():
    assert torch.equal(portable_noise((1, 8), -1), portable_noise((1, 8), 2**64 - 1))
    assert torch.equal(portable_noise((1, 8), 2**64 + 5), portable_noise((1, 8), 5))
    assert torch.equal(portable_noise((1, 8), 5, step=-1), portable_noise((1, 8), 5, step=2**32 - 1))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_shard_is_its_part_of_the_whole(data):
    whole = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    start = [data.draw(st.integers(0, n - 1)) for n in whole]
    size = [data.draw(st.integers(1, n - s)) for n, s in zip(whole, start, strict=True)]
    seeds = seed_table(7, 2)
    part = specified_noise((2, *size), seeds, 3, whole, start)
    index = (slice(None), *(slice(s, s + n) for s, n in zip(start, size, strict=True)))
    assert torch.equal(part, specified_noise((2, *whole), seeds, 3)[index])


# ---- that it is normal ----


def test_error_of_radius_sine_and_cosine():
    """Within 1.3, 2.4 and 1.6 units in the last place of the exact functions of the rounded words."""
    g = torch.Generator().manual_seed(0)
    words = torch.cat([torch.randint(0, 2**32, (2_000_000,), generator=g), torch.tensor(EDGE_WORDS)])
    zero = torch.zeros_like(words)
    r, _ = box_muller(words, zero)  # the cosine of word 0 is exactly 1
    x = (words.float() + 0.5).double()
    exact = torch.sqrt(-2 * torch.log(x / 2**32) + 2.0**-40)
    ulp = torch.exp2(torch.frexp(exact)[1].double() - 24)
    assert ((r.double() - exact).abs() / ulp).max() <= 1.3
    assert r.max() <= 6.7638

    quarter = (4 * words + 2) % 2**32
    t = torch.where(quarter >= 2**31, quarter - 2**32, quarter).float().double() / 2**32
    scale = box_muller(zero, zero)[0].double()
    first, second = box_muller(zero, words)
    swap, sign = (words & 2**30) != 0, torch.where(words >= 2**31, -1.0, 1.0)
    cosine, sine = torch.where(swap, second, first) * sign, torch.where(swap, first, second) * sign
    for got, exact, units in [(cosine, torch.cos(t * math.pi / 2), 1.6), (sine, torch.sin(t * math.pi / 2), 2.4)]:
        # The product with the radius rounds once more: half a unit.
        assert ((got.double() / scale - exact).abs() / exact.abs()).max() <= (units + 0.5) * 2.0**-23


def independent(a, b):
    """Correlation of two equally long draws in units of its standard deviation."""
    return abs((a.double() * b.double()).mean().item()) * math.sqrt(a.numel())


def test_moments_and_distribution():
    """10^8 draws: moments to 5 standard deviations, and Kolmogorov-Smirnov at a level of 10^-6."""
    n, chunk = 10**8, 10**7
    power_sums = torch.zeros(4, dtype=torch.float64)
    edges = torch.linspace(-6.5, 6.5, 20001, dtype=torch.float64)
    counts = torch.zeros(20000, dtype=torch.float64)
    below = 0
    for k in range(n // chunk):
        z = portable_noise((1, chunk), [(2024, k)])[0]
        powers = z.clone()
        for p in range(4):
            power_sums[p] += powers.sum(dtype=torch.float64)
            powers *= z
        counts += torch.histc(z, 20000, -6.5, 6.5)
        below += int((z < -6.5).sum())
    mean, square, cube, fourth = (power_sums / n).tolist()
    assert abs(mean) < 5 / math.sqrt(n)
    assert abs(square - 1) < 5 * math.sqrt(2 / n)
    assert abs(cube) < 5 * math.sqrt(15 / n)
    assert abs(fourth - 3) < 5 * math.sqrt(96 / n)
    empirical = (below + counts.cumsum(0)) / n
    exact = torch.special.ndtr(edges[1:])
    # histc may put a value on an edge to either side: at most a bin edge's float32 rounding, far below the level's distance.
    assert (empirical - exact).abs().max() < math.sqrt(-math.log(1e-6 / 2) / (2 * n))


@pytest.mark.parametrize(
    "other",
    [dict(seed=[(2025, 0)]), dict(seed=[(2024 + 2**32, 0)]), dict(seed=[(2024, 1)]), dict(seed=[(2024, 2**32)]), dict(step=1)],
    ids=["next seed", "next high word", "next sample", "next high sample", "next step"],
)
def test_neighbouring_streams_are_unrelated(other):
    n = 10**6
    a = portable_noise((1, n), **{"seed": [(2024, 0)], "step": 0})[0]
    b = portable_noise((1, n), **{"seed": [(2024, 0)], "step": 0, **other})[0]
    assert independent(a, b) < 5 and independent(a**2 - 1, b**2 - 1) / 2 < 5


def test_neighbouring_elements_are_unrelated():
    z = portable_noise((1, 10**6), 2024)[0]
    for lag in range(1, 9):
        assert independent(z[lag:], z[:-lag]) < 5
        assert independent(z[lag:] ** 2 - 1, z[:-lag] ** 2 - 1) / 2 < 5


# ---- torch's stream of a CUDA card, on the CPU ----


def test_torch_noise_follows_the_layout():
    """Element by element as the layout of torch 2.11 to 2.13 says, from Philox and Box-Muller in float64."""
    n, seed, offset, layout = 5000, 2**40 + 9, 12, (2, 512)
    drawn, after = torch_noise((n,), seed, offset, torch_layout=layout)
    threads = 256 * min(-(-n // 256), 2 * 2)
    assert after == offset + ((n - 1) // (threads * 4) + 1) * 4
    e = torch.arange(n)
    block, inside = e // (4 * threads), e % (4 * threads)
    place, subsequence = inside // threads, inside % threads
    at = offset // 4 + block
    zero = torch.zeros_like(e)
    w = philox((torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)), (at & 0xFFFFFFFF, at >> 32, subsequence, zero))
    first = torch.where(place < 2, w[0], w[2]).double()
    second = torch.where(place < 2, w[1], w[3]).double()
    u, angle = (first + 0.5) / 2**32, (second + 0.5) / 2**32 * 2 * math.pi
    exact = torch.sqrt(-2 * torch.log(u)) * torch.where(place % 2 == 0, torch.sin(angle), torch.cos(angle))
    torch.testing.assert_close(drawn.double(), exact, rtol=0, atol=2e-6)


def test_torch_noise_rounds_once_and_depends_on_the_card():
    drawn, _ = torch_noise((3, 70_000), 5, torch_layout=(108, 2048))
    assert torch.equal(torch_noise((3, 70_000), 5, torch_layout=(108, 2048), dtype=torch.bfloat16)[0], drawn.bfloat16())
    other, _ = torch_noise((3, 70_000), 5, torch_layout=(80, 1536))
    assert not torch.equal(other, drawn) and torch.equal(other[0, :256], drawn[0, :256])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(torch_layout=(80,)), TypeError, r"torch_layout must be \(multiprocessors, threads of each\)"),
        (dict(torch_layout=(80, 128)), ValueError, r"at least 256 threads, got \(80, 128\)"),
        (
            dict(torch_layout=(80, 1536), dtype=torch.float64),
            TypeError,
            r"dtype must be float32, bfloat16 or float16, got torch.float64",
        ),
    ],
)
def test_bad_torch_noise(arguments, error, message):
    with pytest.raises(error, match=message):
        torch_noise((4,), 1, **arguments)


class Counting:
    """In the place of a CUDA device's generator: element e at an offset is their sum."""

    def __init__(self, device):
        self.offset = 0

    def manual_seed(self, seed):
        return self

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset

    def draw(self, n, **kwargs):
        self.offset += -(-n // 4) * 4
        return torch.arange(n, **kwargs) + self.offset


@pytest.mark.parametrize(
    "ahead, off, expected", [(0, 0, True), (4, 0, False), (-4, 0, False), (0, 4098, False), (0, 300_006, False)]
)
def test_a_stream_is_torchs_in_every_number_and_in_where_it_ends(ahead, off, expected, monkeypatch):
    monkeypatch.setattr(torch, "Generator", Counting)
    monkeypatch.setattr(torch, "randn", lambda n, generator, **kwargs: generator.draw(n, **kwargs))

    def draw(out, generator):
        out.copy_(generator.draw(len(out), dtype=out.dtype))
        out[off:][:1] += off > 0
        generator.set_offset(generator.get_offset() + ahead)

    assert is_torch_stream(draw, torch.device("cpu"), torch.float32) == expected


# ---- bad input ----


@pytest.mark.parametrize(
    "seed, error, message",
    [
        (1.5, TypeError, r"seed must be a whole number or a list .* got float"),
        ("7", TypeError, r"seed must be a whole number or a list .* got str"),
        (True, TypeError, r"seed must be a whole number"),
        ([1, 2], ValueError, r"seed must be one number or 3, one for each sample of the batch, got 2"),
        ([1, 2, 3.0], TypeError, r"whole numbers or pairs \(seed, sample\) of them, got 3.0"),
        ([(1, 2, 3)] * 3, TypeError, r"pairs \(seed, sample\)"),
        ([(1, 2**48)] * 3, ValueError, r"samples from 0 to 2\^48 - 1, got 281474976710656"),
        ([(1, -1)] * 3, ValueError, r"samples from 0 to 2\^48 - 1, got -1"),
    ],
)
def test_bad_seeds(seed, error, message):
    with pytest.raises(error, match=message):
        portable_noise((3, 2), seed)
