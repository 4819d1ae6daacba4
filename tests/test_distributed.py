"""Runs over processes: the same bits however the work was split and wherever it was killed, and errors that name the file.

ERSDE_FAST_KILLS=20 python -m pytest tests/test_distributed.py        # so many kills in the place of one
"""

import errno
import itertools
import multiprocessing
import os
import random
import threading
import time
from pathlib import Path

import distributed_cases
import numpy as np
import pytest
import torch
from distributed_cases import PLAN, SHAPE, model
from safetensors.torch import load_file, save_file

from ersde_fast import er_sde_plan, fast_step, portable_noise, sample_er_sde
from ersde_fast.distributed import generate, generation, load_samples
from ersde_fast.distributed.generation import INDEX

KILLS = int(os.environ.get("ERSDE_FAST_KILLS", 1))
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ersde_fast.distributed"])  # which takes a process seconds


def start(tmp_path, world, do="generate", **say):
    """The processes of one run, named by the files of what they say."""
    store = tmp_path / f"store-{time.monotonic_ns()}"
    processes = []
    for rank in range(world):
        said = f"{store}-{rank}.txt"
        say |= {"do": do, "world": world, "rank": rank, "store": str(store), "said": said}
        processes.append(SERVER.Process(target=distributed_cases.main, args=(say,), name=said))
        processes[-1].start()
    return processes


def ended(process):
    """What a process said in all."""
    process.join(120)
    return Path(process.name).read_text()


def finish(processes):
    said = [ended(process) for process in processes]
    assert all(process.exitcode == 0 for process in processes), "\n".join(said)
    return said


def expected(seeds):
    """Each sample alone, by the sampler itself."""
    x = 10 * torch.cat([portable_noise((1, *SHAPE), seed, step=-1) for seed in seeds])
    return sample_er_sde(model, x, PLAN.sigmas, disable=True, seed=list(seeds), max_stage=3)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_sample_belongs_to_its_seed(tmp_path, batch_size):
    seeds = [5, 2**64 - 1, 0, 17, *range(100, 120)]
    generate(model, PLAN, seeds, SHAPE, tmp_path / "out", batch_size, progress=False)
    assert torch.equal(load_samples(tmp_path / "out"), expected(seeds))
    assert torch.equal(load_samples(tmp_path / "out", [17, 2**64 - 1]), expected([17, 2**64 - 1]))
    assert torch.equal(load_samples(tmp_path / "out", [-1]), expected([2**64 - 1]))


def test_whole_numbers_of_numpy_are_those_of_python(tmp_path):
    """The run is the same one, so that nothing is computed again."""
    seeds, shape = [np.int64(-1), np.uint64(2**63), np.int32(4)], tuple(np.array(SHAPE))
    generate(model, PLAN, seeds, shape, tmp_path, np.int64(2), progress=False)
    generate(lambda x, sigma: 1 / 0, PLAN, [2**64 - 1, 2**63, 4], SHAPE, tmp_path, progress=False)
    assert torch.equal(load_samples(tmp_path), expected([2**64 - 1, 2**63, 4]))


def test_more_seeds_later_and_nothing_twice(tmp_path):
    calls = []

    def counted(x, sigma):
        calls.append(len(x))
        return model(x, sigma)

    generate(counted, PLAN, range(10), SHAPE, tmp_path, 4, progress=False)
    generate(counted, PLAN, range(25), SHAPE, tmp_path, 3, progress=False)
    assert sum(calls) == 25 * PLAN.num_steps
    generate(counted, PLAN, range(25), SHAPE, tmp_path, 3, progress=False)
    assert sum(calls) == 25 * PLAN.num_steps
    assert torch.equal(load_samples(tmp_path), expected(range(25)))


def test_labels_of_seeds_and_what_is_kept(tmp_path):
    """The model's further arguments follow the seeds; the transform's result is stored, in its own dtype."""

    def conditional(x, sigma, shift):
        return model(x, sigma) + shift[:, None, None]

    labels = lambda seeds: {"shift": torch.tensor([float(seed % 3) for seed in seeds])}  # noqa: E731
    transform = lambda x: (x * 40 + 128).clamp(0, 255).to(torch.uint8)  # noqa: E731
    for folder, batch_size in (("a", 4), ("b", 9)):
        generate(
            conditional,
            PLAN,
            range(9),
            SHAPE,
            tmp_path / folder,
            batch_size,
            extra_args=labels,
            transform=transform,
            progress=False,
        )
    kept = load_samples(tmp_path / "a")
    assert kept.dtype == torch.uint8 and torch.equal(kept, load_samples(tmp_path / "b")) and len(kept.unique()) > 20
    alone = sample_er_sde(
        lambda x, s: model(x, s) + 2, 10 * portable_noise((1, *SHAPE), 5, step=-1), PLAN.sigmas, disable=True, seed=[5]
    )
    assert torch.equal(kept[5], transform(alone)[0])


def test_a_transform_may_write_every_batch_to_the_same_memory(tmp_path, monkeypatch):
    """A batch may be written to disk only when the next has been computed."""
    memory, write, calls, twice = torch.empty(4, *SHAPE), generation._write, itertools.count(), threading.Event()

    def transform(x):
        memory.copy_(x)
        if next(calls) == 1:
            twice.set()
        return memory

    def write_late(*args):
        assert twice.wait(60)
        return write(*args)

    monkeypatch.setattr(generation, "_write", write_late)
    generate(model, PLAN, range(8), SHAPE, tmp_path, 4, transform=transform, progress=False)
    assert torch.equal(load_samples(tmp_path), expected(range(8)))


def test_from_a_models_raw_output(tmp_path):
    """As the sampler takes it; a run with another standard deviation of the data is another run."""
    plans = [er_sde_plan(PLAN.sigmas, order=3, sigma_data=sigma_data) for sigma_data in (0.5, 0.6)]
    generate(model, plans[0], range(9), SHAPE, tmp_path, 4, prediction_type="edm", progress=False)
    x = 10 * portable_noise((9, *SHAPE), [(seed, 0) for seed in range(9)], step=-1)
    settings = dict(prediction_type="edm", sigma_data=0.5, max_stage=3, seed=list(range(9)))
    assert torch.equal(load_samples(tmp_path), sample_er_sde(model, x, PLAN.sigmas, disable=True, **settings))
    with pytest.raises(ValueError, match="is of a run with another plan"):
        generate(model, plans[1], range(12), SHAPE, tmp_path, prediction_type="edm", progress=False)
    with pytest.raises(ValueError, match=r"prediction_type must be None or one of .*, got 'flows'"):
        generate(model, plans[0], range(9), SHAPE, tmp_path / "b", prediction_type="flows", progress=False)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work(tmp_path, world):
    said = finish(start(tmp_path, world, seeds=50, batch=4, out=str(tmp_path / "out"), progress=True))
    assert torch.equal(load_samples(tmp_path / "out"), expected(range(50)))
    assert "50/50" in said[0] and not any("sample" in text for text in said[1:])


@pytest.mark.parametrize("world", [1, 2, 4] if KILLS > 1 else [1, 2])
def test_killed_at_any_moment(tmp_path, world):
    """All processes get SIGKILL again and again, at random moments, with another number of them and another batch each time."""
    rng = random.Random(world)
    seeds, out = (2000 if KILLS > 1 else 200), tmp_path / "out"
    for _ in range(KILLS):
        before = len(list(out.glob("samples-*")))
        processes = start(tmp_path, world, seeds=seeds, batch=rng.randint(3, 12), out=str(out), sleep=0.002)
        while len(list(out.glob("samples-*"))) == before and any(process.is_alive() for process in processes):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        files = [load_file(path) for path in out.glob("samples-*.safetensors")]  # every one whole
        assert files and len({seed for file in files for seed in file["seeds"].tolist()}) == sum(
            len(file["seeds"]) for file in files
        )
    if not (out / INDEX).exists():
        with pytest.raises(FileNotFoundError, match="not finished"):
            load_samples(out)
    finish(start(tmp_path, world, seeds=seeds, batch=50, out=str(out)))
    assert torch.equal(load_samples(out), expected(range(seeds)))
    assert not list(out.glob(".*"))


def test_one_of_several_fails_or_dies(tmp_path):
    """The others end with a message that says what is kept, and the next run finishes."""
    out = tmp_path / "out"
    processes = start(tmp_path, 2, seeds=60, batch=4, out=str(out), fails=1, fails_at=15)
    said = [ended(process) for process in processes]
    assert all(process.exitcode for process in processes)
    assert "1 of the other processes failed" in said[0] and "call generate again for the rest" in said[0]
    assert "ArithmeticError: this process fails on purpose" in said[1]
    processes = start(tmp_path, 2, seeds=60, batch=4, out=str(out), dies=1, dies_at=15)
    said = [ended(process) for process in processes]
    assert "another process than rank 0 has died" in said[0] and "samples are in" in said[0] and processes[1].exitcode == 9
    finish(start(tmp_path, 2, seeds=60, batch=4, out=str(out)))
    assert torch.equal(load_samples(out), expected(range(60)))


@pytest.mark.parametrize("world", [2, 4] if KILLS > 1 else [4])
def test_latents_split_over_processes(tmp_path, world):
    finish(start(tmp_path, world, do="sharded"))


def test_two_hundred_random_splits_of_a_latent():
    """Cut anywhere, in any dimensions: the shards' steps are the whole step, and their bits too."""
    rng, shape = random.Random(0), (2, 3, 9, 14)
    x, history = 10 * portable_noise(shape, 1, step=-1), [portable_noise(shape, 2, step=j) for j in range(3)]
    whole = fast_step(PLAN, 3, x, history, seed=[8, 9])
    for _ in range(200):
        cuts = [sorted({0, n, *(rng.randint(0, n) for _ in range(rng.randint(0, 3)))}) for n in shape[1:]]
        spans = [list(itertools.pairwise(c)) for c in cuts]
        result = torch.empty_like(whole)
        for c in spans[0]:
            for h in spans[1]:
                for w in spans[2]:
                    here = (slice(None), slice(*c), slice(*h), slice(*w))
                    result[here] = fast_step(
                        PLAN, 3, x[here], [d[here] for d in history], seed=[8, 9], global_shape=shape[1:], global_start=(c[0], h[0], w[0])
                    )  # fmt: skip
        assert torch.equal(result, whole), cuts


# ---- what goes wrong ----


def filled(folder):
    generate(model, PLAN, range(20), SHAPE, folder, 5, progress=False)
    return folder, sorted(folder.glob("samples-*"))


def test_damaged_files_are_named_and_nothing_else_is_lost(tmp_path):
    folder, files = filled(tmp_path)
    whole = files[1].read_bytes()
    for content in (whole[:-7], whole[:5], b"", b"\xff" * 200, whole[:8] + b"{" * (len(whole) - 8)):
        files[1].write_bytes(content)
        for act in (lambda: generate(model, PLAN, range(30), SHAPE, folder, 5, progress=False), lambda: load_samples(folder)):
            with pytest.raises(ValueError, match=f"{files[1].name} is damaged: delete it and call generate again"):
                act()
    save_file({"samples": torch.zeros(2, *SHAPE), "seeds": torch.zeros(3, dtype=torch.int64)}, files[1], {"run": "x"})
    with pytest.raises(ValueError, match=f"{files[1].name} is damaged: it has 3 seeds for other samples"):
        load_samples(folder)
    files[1].unlink()
    with pytest.raises(ValueError, match=f"{files[1].name} is missing"):
        load_samples(folder)
    generate(model, PLAN, range(20), SHAPE, folder, 5, progress=False)
    assert torch.equal(load_samples(folder), expected(range(20)))


def test_files_of_another_run_are_not_touched(tmp_path):
    folder, files = filled(tmp_path)
    before = files[0].read_bytes()
    levels = PLAN.sigmas
    others = [er_sde_plan(levels, s_noise=1.1), er_sde_plan(levels, eta=0.9), er_sde_plan([12, *levels]).starting_at(1)]
    others += [er_sde_plan(levels * (1 + 2e-7)), er_sde_plan(levels, order=[1, 2, 3, 3, 2, 1])]
    for arguments in (*((other, range(20), SHAPE) for other in others), (PLAN, range(20), (5, 3))):
        with pytest.raises(ValueError, match="is of a run with another plan, shape, dtype or prediction_type"):
            generate(model, *arguments, folder, progress=False)
    with pytest.raises(ValueError, match="is of a run with another plan, shape, dtype or prediction_type"):
        generate(model, PLAN, range(20), SHAPE, folder, dtype=torch.float64, progress=False)
    with pytest.raises(ValueError, match="is of a run with another plan, shape, dtype or prediction_type"):
        generate(model, PLAN, range(20), SHAPE, folder, prediction_type="sample", progress=False)
    (folder / "samples-x.safetensors").write_bytes(before)
    with pytest.raises(ValueError, match="both hold seed 0"):
        generate(model, PLAN, range(20), SHAPE, folder, progress=False)
    assert files[0].read_bytes() == before


def test_a_run_is_known_by_its_plans_numbers(tmp_path):
    """Not by the name of its scaler, which functions share; and whichever builder made the plan."""
    powers = [er_sde_plan(PLAN.sigmas, noise_scaler=lambda l, p=p: l**p) for p in (1.5, 1.6)]
    generate(model, powers[0], [1], SHAPE, tmp_path, progress=False)
    with pytest.raises(ValueError, match="is of a run with another plan"):
        generate(model, powers[1], [1, 2], SHAPE, tmp_path, progress=False)
    named = er_sde_plan(PLAN.sigmas, noise_scaler="sde_2")
    assert not torch.equal(named.weights, powers[0].weights)
    generate(model, named, [1, 2], SHAPE, tmp_path, progress=False)
    assert len(load_samples(tmp_path)) == 2


def test_the_index_is_data(tmp_path):
    folder, _ = filled(tmp_path)
    for content in (b"", b"[]", b'{"files": 3}', b'{"files": {}, "seeds": 3'):
        (folder / INDEX).write_bytes(content)
        with pytest.raises(ValueError, match=r"index.json is damaged: delete it and call generate again"):
            load_samples(folder)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"out_dir must be a folder that can be written, got .*file"):
        generate(model, PLAN, range(3), SHAPE, tmp_path / "file", progress=False)

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"out_dir must be a folder that can be written, got .*Read-only file system"):
        generate(
            lambda x, sigma: pytest.fail("sampled before the folder was tried"), PLAN, range(3), SHAPE, tmp_path, progress=False
        )


def test_a_full_disk(tmp_path, monkeypatch):
    """What was written stays, what could not be is named, and no part of it is left behind."""
    written, real = [], os.fsync

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*samples-000000010.safetensors: No space left on device"):
        generate(model, PLAN, range(20), SHAPE, tmp_path, 5, progress=False)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("samples-*"))) == 2 and not list(tmp_path.glob(".*"))
    generate(model, PLAN, range(20), SHAPE, tmp_path, 5, progress=False)
    assert torch.equal(load_samples(tmp_path), expected(range(20)))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(plan="x"), TypeError, "plan must be a plan of er_sde_plan"),
        (dict(seeds=[]), TypeError, "seeds must be a list or range of at least one whole number"),
        (dict(seeds=5), TypeError, "seeds must be a list or range"),
        (dict(seeds=[1, 2.5]), TypeError, "seeds must be a list or range"),
        (dict(seeds=[1, 3, 1]), ValueError, "seeds must differ .* got 1 twice"),
        (dict(seeds=[-1, 2**64 - 1]), ValueError, "seeds must differ"),
        (dict(seeds=[2, True]), TypeError, "seeds must be a list or range of at least one whole number, got True"),
        (dict(shape=(3, 0)), ValueError, "shape must hold the positive sizes"),
        (dict(batch_size=0), ValueError, "batch_size must be a whole number of at least 1, got 0"),
        (dict(batch_size=np.float64(2)), ValueError, "batch_size must be a whole number of at least 1"),
        (dict(dtype=torch.int32), TypeError, "dtype must be float32"),
        (dict(transform=lambda x: x[:1]), ValueError, "transform must return one result a sample, 4, got 1"),
        (
            dict(transform=lambda x: x.numpy()),
            TypeError,
            "transform must return a tensor .*, got ndarray: use torch.from_numpy",
        ),
        (dict(transform="uint8"), TypeError, "transform must be a function or None, got str"),
        (dict(extra_args={"labels": 1}), TypeError, "extra_args must be a function or None, got dict"),
        (
            dict(extra_args=lambda seeds: seeds),
            TypeError,
            "extra_args must return a dict of further arguments of model, got list",
        ),
        (dict(seeds=torch.arange(4)), TypeError, r"seeds must be a list or range .*, got Tensor: use seeds.tolist\(\)"),
    ],
)
def test_bad_input(tmp_path, change, error, message):
    arguments = dict(model=model, plan=PLAN, seeds=range(4), shape=SHAPE, out_dir=tmp_path / "out", progress=False) | change
    with pytest.raises(error, match=message):
        generate(**arguments)


def test_seeds_to_load_are_whole(tmp_path):
    generate(model, PLAN, range(2), SHAPE, tmp_path, progress=False)
    with pytest.raises(TypeError, match=r"seeds must be whole numbers, got \[1.7\]"):
        load_samples(tmp_path, [1.7])
    with pytest.raises(TypeError, match=r"seeds must be whole numbers, got \[False, True\]"):
        load_samples(tmp_path, [False, True])
    assert torch.equal(load_samples(tmp_path, np.array([1])), load_samples(tmp_path)[1:])


def test_processes_that_are_not_initialized(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        generate(model, PLAN, range(4), SHAPE, tmp_path, progress=False)
