"""Checks the wheels of `make wheels`, by Python alone: their contents, and the bits that their libraries give.

    python tests/check_wheels.py dist

A small C program, tests/kernels_program.c, draws the golden noise, builds the golden plans and steps the golden steps with the library
of each wheel: here, under qemu-user (aarch64) and under wine (Windows), and with the libraries that the compilers of this machine make.
Noise and steps must be the same bits from all of them; plans, which take exponentials of each system's own, to 1e-13. What is not
installed here is left out, and said. macOS's library is never run: its imports and exports are read.
"""

import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import lief

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
LARGEST = 3 * 2**20  # bytes of a wheel
COLUMNS = re.search(r"enum ersde_column \{ (.*?) \}", (ROOT / "csrc" / "er_sde_c.h").read_text())[1].split(", ")
W_NOISE, W_D = COLUMNS.index("ersde_w_noise"), COLUMNS.index("ersde_w_d")
LIBRARIES = {"manylinux2014_x86_64": "_kernels.so", "manylinux2014_aarch64": "_kernels.so", "macosx_11_0_arm64": "_kernels.dylib", "win_amd64": "_kernels.dll"}  # fmt: skip
# What every system of the platform has.
IMPORTS = r"@rpath/_kernels\.dylib|lib(c|m|pthread|dl)\.so\.\d|ld-linux-.*|/usr/lib/libSystem\.B\.dylib|KERNEL32\.dll|api-ms-win-crt-.*|msvcrt\.dll|ntdll\.dll"
LINKERS_OWN = {"init", "fini", "mh_dylib_header", "dso_handle"}
# By the authors' numbers.
FORMS = [None, ("sde", 0), ("sde", 1), ("sde_1", 1), ("sde", 0.5), ("sde", 1.5), ("sde_4", 1), ("sde_5", 1)]
ZIG = [sys.executable, "-m", "ziglang"]


def contents(wheel: Path, platform: str, folder: Path) -> Path:
    """Unpacks a wheel; its library."""
    assert wheel.stat().st_size < LARGEST, f"{wheel.name} has {wheel.stat().st_size} bytes"
    assert wheel.name.endswith(f"-py3-none-{platform}.whl"), wheel.name
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(folder)
    made = {f"ersde_fast/{path.relative_to(ROOT / 'ersde_fast')}" for path in (ROOT / "ersde_fast").rglob("*.py")}
    made |= {
        f"ersde_fast/{path.relative_to(ROOT)}" for glob in ("csrc/*.h", "csrc/*.cu", "kernels/*.py") for path in ROOT.glob(glob)
    }
    made |= {"ersde_fast/_build_info.py", "ersde_fast/py.typed", f"ersde_fast/{LIBRARIES[platform]}"}
    assert {name for name in names if name.startswith("ersde_fast/")} == made, names ^ made
    library = folder / "ersde_fast" / LIBRARIES[platform]
    binary = lief.parse(str(library))
    exported = {getattr(f, "name", f).lstrip("_") for f in binary.exported_functions}
    declared = set(re.findall(r"ERSDE_API \S.*?(ersde_\w+)\(", (ROOT / "csrc" / "er_sde_c.h").read_text()))
    assert exported - LINKERS_OWN == declared, exported ^ declared
    imported = [getattr(name, "name", name) for name in binary.libraries]
    assert all(re.fullmatch(IMPORTS, name) for name in imported), imported
    print(f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB, {len(declared)} functions, needs {', '.join(imported)}")
    return library


def cases() -> list[dict]:
    """The golden runs that follow the equations alone."""
    found = []
    for peer in ("comfyui", "official", "invokeai"):
        found += json.loads((GOLDEN / f"open_{peer}.json").read_text())["cases"]
    return [case for case in found if case.get("stochastic", True)]


def form(case: dict) -> tuple[str, float]:
    scaler = case["scaler"]
    return ("sde", scaler["eta"]) if scaler["number"] is None else FORMS[scaler["number"]]


def denoised(case: dict, x: float, sigma: float, alpha: float) -> float:
    d = case["denoiser"]
    weights, means, stds = ([1.0], [d["mu"]], [d["s"]]) if d["name"] == "gaussian" else (d["w"], d["m"], d["s"])
    variances = [alpha**2 * s**2 + sigma**2 for s in stds]
    terms = list(zip(weights, means, stds, variances, strict=True))
    logs = [math.log(w) - (x - alpha * m) ** 2 / (2 * v) - math.log(v) / 2 for w, m, s, v in terms]
    shares = [math.exp(log - max(logs)) for log in logs]
    values = [(sigma**2 * m + s**2 * alpha * x) / v for w, m, s, v in terms]
    return sum(p * v for p, v in zip(shares, values, strict=True)) / sum(shares)


def tolerance(case: dict) -> float:
    if case["dtype"] == "float32":
        return 2.4e-5
    return 4e-7 if (case["quadrature"]["dtype"] == "float32" and case["order"] > 1) or case["scaler"]["name"] == "ODE" else 1e-9


def flat(values) -> list[float]:
    return [v for value in values for v in flat(value)] if isinstance(values, list) else [values]


def bits(values: list[float]) -> str:
    return " ".join(f"{word:016x}" for word in struct.unpack(f"{len(values)}Q", struct.pack(f"{len(values)}d", *values)))


def numbers(line: str) -> list[float]:
    return [struct.unpack(">d", bytes.fromhex(word))[0] for word in line.split()]


def plan_call(case: dict) -> str:
    scaler, strength = form(case)
    steps, points = len(case["sigmas"]) - 1, case["quadrature"]["points"] or 0
    levels = " ".join(map(repr, [*case["sigmas"], *case["alphas"]]))
    return f"plan {steps} {case['order']} {points} {scaler} {strength!r} taylor inf {case['s_noise']!r} {levels}"


def steps_of(case: dict, table: list[float]) -> list[tuple[str, list[float]]]:
    """Calls of the steps of a run, each from the golden sample before it, and the golden samples behind them."""
    columns, found, history = W_D + case["order"], [], []
    samples = [flat(case["x_init"]), *map(flat, case["x_after_step"])]
    for i, (x, after) in enumerate(pairwise(samples)):
        row = table[i * columns : (i + 1) * columns]
        clipped = 0 < row[W_NOISE] ** 2 < case.get("variance_clip", 0)
        history = [[denoised(case, v, case["sigmas"][i], case["alphas"][i]) for v in x], *history[:2]]
        tensors = [x, *history, *[[0.0] * len(x)] * (case["order"] - len(history))][: 1 + case["order"]]
        tensors.append(flat(case["noise"][i]) if case["noise"][i] is not None else [0.0] * len(x))
        numbers_of_row = " ".join(map(repr, row))
        if not clipped:
            call = f"step 1 {case['order']} - {len(x)} {numbers_of_row} {' '.join(map(bits, tensors))}"
            found.append((call, after))
    return found


def calls_of_all_types() -> list[str]:
    """Steps of every type and both sources of noise, in odd counts."""
    generator, found = random.Random(0), []
    row = {"ersde_counter": 7, "ersde_p_m": 1, "ersde_w_noise": 0.8, "ersde_w_x": 0.3}
    weights = " ".join(str(row.get(column, 0)) for column in COLUMNS[:W_D]) + " 0.9 -0.4 0.1"

    def number(size: int, mantissa: int, exponents: tuple[int, int]) -> str:
        """Of either sign, any mantissa and an exponent of a middle range, so that no sum is infinite."""
        exponent = generator.randint(*exponents) << mantissa
        return f"{generator.getrandbits(1) << (8 * size - 1) | exponent | generator.getrandbits(mantissa):0{2 * size}x}"

    types = [(4, 23, (100, 140)), (8, 52, (1000, 1040)), (2, 7, (100, 140)), (2, 10, (5, 20))]
    for (dtype, form), n, seed in product(enumerate(types), (1, 7, 1003, 4099), ("-", "0x91b7584a2265b1f5")):
        words = " ".join(number(*form) for _ in range(n * (5 if seed == "-" else 4)))
        found.append(f"step {dtype} 3 {seed} {n} {weights} {words}")
    return found


def run(program: list, library: Path, lines: list[str]) -> list[str]:
    done = subprocess.run([*map(str, program), str(library)], input="\n".join(lines) + "\n", capture_output=True, text=True)
    assert done.returncode == 0, f"{program}: {done.stderr}"
    answers = done.stdout.splitlines()
    assert len(answers) == len(lines), (program, len(answers), len(lines))
    return answers


def of_this_machine(folder: Path) -> dict[str, Path]:
    """The libraries that this machine's compilers make of the source, as pip would."""
    found = {}
    for compiler in ("g++", "clang++"):
        if shutil.which(compiler):
            built = folder / compiler
            command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", built, "--build-temp", built]
            (built / "ersde_fast").mkdir(parents=True)
            subprocess.run(list(map(str, command)), cwd=ROOT, check=True, env=os.environ | {"CXX": compiler})
            found[compiler] = built / "ersde_fast" / "_kernels.so"
    return found


def programs(folder: Path) -> dict[str, list]:
    """For each platform that can be run here, the command that runs the C program."""
    wanted = {
        "manylinux2014_x86_64": ("x86_64-linux-gnu.2.17", []),
        "manylinux2014_aarch64": ("aarch64-linux-gnu.2.17", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]),
        "win_amd64": ("x86_64-windows-gnu", ["wine"]),
    }
    found = {}
    for platform, (target, runner) in wanted.items():
        if runner and not shutil.which(runner[0]):
            print(f"{platform}: not run, {runner[0]} is not installed")
            continue
        program = folder / f"{platform}.exe"
        libraries = [] if platform == "win_amd64" else ["-ldl"]
        source = ROOT / "tests" / "kernels_program.c"
        subprocess.run([*ZIG, "cc", "-target", target, "-O1", "-g0", source, *libraries, "-o", program], check=True)
        found[platform] = [*runner, program]
    return found


def main(dist: Path) -> None:
    lief.logging.disable()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        libraries = {}
        for platform in LIBRARIES:
            (wheel,) = dist.glob(f"*-{platform}.whl")
            libraries[platform] = contents(wheel, platform, folder / platform)
            if "linux" in platform:
                said = subprocess.run(
                    [sys.executable, "-m", "auditwheel", "show", wheel], check=True, capture_output=True, text=True
                ).stdout
                assert "manylinux_2_17" in said or "manylinux2014" in said, said
        commands = programs(folder)
        runs = {platform: partial(run, command, libraries[platform]) for platform, command in commands.items()}
        here = commands["manylinux2014_x86_64"]
        runs |= {compiler: partial(run, here, library) for compiler, library in of_this_machine(folder).items()}

        first = runs["manylinux2014_x86_64"]
        runs_of_others = cases()
        plan_calls = list(map(plan_call, runs_of_others))
        tables = list(map(numbers, first(plan_calls)))
        steps = [(case, *step) for case, table in zip(runs_of_others, tables, strict=True) for step in steps_of(case, table)]
        golden = json.loads((GOLDEN / "portable_noise.json").read_text())
        draws = [f"noise {r['seed']} {r['step']} {r['sample']} {r['first']} {r['n']}" for r in golden["runs"]]
        pairs = [f"pair 0x{p['a']} 0x{p['b']}" for p in golden["box_muller"]]
        calls = [*draws, *pairs, *(call for _, call, _ in steps), *calls_of_all_types()]
        expected = first(["set 1", *calls])[1:]

        for r, line in zip(golden["runs"], expected, strict=False):
            assert r["normals"] is None or line.split() == r["normals"], r
        for p, line in zip(golden["box_muller"], expected[len(draws) :], strict=False):
            assert line.split() == p["normals"], p
        for (case, _, after), line in zip(steps, expected[len(draws) + len(pairs) :], strict=False):
            error = max(abs(v - e) / max(1, abs(e)) for v, e in zip(numbers(line), after, strict=True))
            assert error <= tolerance(case), (case["id"], error)
        print(
            f"golden: {len(golden['runs'])} runs of noise, {len(pairs)} pairs, {len(steps)} steps of {len(runs_of_others)} runs"
        )

        for platform, call in runs.items():
            for number in (1, 2, 3):  # plain, then those of x86-64 alone
                (instruction_set,) = call([f"set {number}"])
                if instruction_set != "-":
                    assert call([f"set {number}", *calls])[1:] == expected, (platform, instruction_set)
                    print(f"{platform}, {instruction_set}: the same bits")
            close = [math.isclose(*v, rel_tol=1e-13, abs_tol=1e-13) for made, table in zip(call(plan_calls), tables, strict=True) for v in zip(numbers(made), table, strict=True)]  # fmt: skip
            assert all(close), (platform, close.count(False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
