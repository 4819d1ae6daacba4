"""Samples by the ten thousand, over processes and machines.

Every sample belongs to its seed alone, so no result depends on the number of processes, on the batches or on where a run was killed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from ..backends.base import FLOATS
from ..draw import portable_noise
from ..files import safetensors_for, write_whole
from ..noise import seed_table
from ..plan import Plan
from ..request import inside
from ..sample import Output, Source, sample_plan
from ..schedules import is_whole

INDEX = "index.json"


def generate(
    model: Callable[..., Tensor],
    plan: Plan,
    seeds: Sequence[int],
    shape: Sequence[int],
    out_dir: str | os.PathLike,
    batch_size: int = 64,
    *,
    extra_args: Callable[[list[int]], dict] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> None:
    """Samples every seed and writes the samples into a folder, shared out over the processes of torch.distributed.

    Call it in every process, after `torch.distributed.init_process_group`, or in one process without that. Each batch becomes a
    safetensors file that appears whole or not at all, and at the end the first process writes `index.json`. A run that was killed at
    any moment goes on where it was when it is called again, with any number of processes and any batch size: what is in the folder
    is kept, and the samples are those of a run that nothing interrupted. `load_samples` reads them.

    Args:
        model: `model(x, sigma, **extra_args)`, sigma [batch], to the denoised sample. A seed's sample has the same bits in every
            batch if the model's do.
        plan: of `er_sde_plan`, on the CPU.
        seeds: distinct whole numbers, one a sample. Sample s starts from plan.sigmas[0] times `portable_noise` of seed s at step -1,
            and each step draws the portable stream of s.
        shape: of one sample, without the batch.
        out_dir: the folder, one that every process sees; made if there is none. It holds samples of one plan, shape and dtype.
        batch_size: samples that one process computes together.
        extra_args: from a batch's seeds to the model's further arguments, such as class labels.
        transform: what is kept of a batch of samples, [batch, ...] to [batch, ...], such as a decoder's images.
        prediction_type: what the model returns, where that is not the denoised sample; see `ersde_fast.fast_step`.
        dtype, device: of the latents.
        progress: shows one progress bar, the first process's.

    Raises:
        ValueError, TypeError: naming the argument, or the file in `out_dir` that is damaged or of another run.
        OSError: naming the file that could not be written. Nothing finished is lost.
        RuntimeError: another process failed or died; every finished batch is kept.

    Source: docs/scaling.md.
    """
    seeds, shape = _check(plan, seeds, shape, batch_size, dtype)
    for name, function in [("extra_args", extra_args), ("transform", transform)]:
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function or None, got {type(function).__name__}: write lambda batch: ...")
    rank, world, group = _processes()
    folder, run = Path(out_dir), _fingerprint(plan, shape, dtype, prediction_type)
    done = _from_first(lambda: _prepare(folder, run, seeds), rank, group)
    missing = [seed for seed in seeds if seed not in done]
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    written = len(seeds) - len(missing)
    bar = tqdm(total=len(seeds), initial=written, unit="sample", disable=not progress or rank > 0)
    with bar, ThreadPoolExecutor(1) as disk:
        sums, writing = _Sums(rank, group, folder, written), None
        for round_ in range(0, len(batches) + world, world):  # the last round is for what is still being written
            batch, count, error = batches[round_ + rank] if round_ + rank < len(batches) else [], 0, None
            try:
                samples = None
                if batch:
                    samples = _sample(model, plan, batch, shape, extra_args, prediction_type, dtype, device)
                    samples = _transformed(samples, transform)
                count = writing.result() if writing else 0  # the batch before, written while this one was computed
                writing = None
                if batch:
                    path = folder / f"samples-{seeds.index(batch[0]):09d}.safetensors"
                    writing = disk.submit(_write, path, batch, samples, run)
            except BaseException as caught:  # the others must not wait for this process
                error = caught
            bar.update(sums.hear(own_error=error))
            sums.say(count if error is None else 0, error is not None)
            if error is not None or group is None:
                bar.update(sums.hear(own_error=error))
        bar.update(sums.hear())
    _from_first(lambda: _write_index(folder, run, seeds, shape, dtype), rank, group)
    if group is not None:
        dist.destroy_process_group(group)


def load_samples(out_dir: str | os.PathLike, seeds: Sequence[int] | None = None) -> Tensor:
    """The samples of a finished run of `generate`, [len(seeds), ...].

    Args:
        out_dir: the folder.
        seeds: which, in this order; None is every seed in the order given to `generate`.

    Returns:
        [len(seeds), ...] on the CPU, in the dtype that they were made in.

    Raises:
        ValueError, TypeError: naming the file that is damaged, or a seed that is not there or is none.
        FileNotFoundError: the run is not finished.

    Source: docs/scaling.md.
    """
    folder = Path(out_dir)
    if not (folder / INDEX).exists():
        raise FileNotFoundError(f"{folder / INDEX} is not there: the run of generate is not finished, call it again")
    try:
        index = json.loads((folder / INDEX).read_text())
        place = {seed: (name, row) for name, held in index["files"].items() for row, seed in enumerate(held)}
        order = index["seeds"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged: delete it and call generate again ({error})") from None
    if seeds is not None and not all(map(is_whole, seeds)):
        raise TypeError(f"seeds must be whole numbers, got {seeds!r}")
    wanted = order if seeds is None else [int(seed) % 2**64 for seed in seeds]
    if lacking := [seed for seed in wanted if seed not in place]:
        raise ValueError(f"seeds must be among those of {folder / INDEX}, got {lacking[0]}")
    shards = {name: _read(folder / name)[1] for name in dict.fromkeys(place[seed][0] for seed in wanted)}
    return torch.stack([shards[place[seed][0]][place[seed][1]] for seed in wanted])


def _check(plan, seeds, shape, batch_size, dtype) -> tuple[list[int], tuple[int, ...]]:
    if not isinstance(plan, Plan) or plan.table.device.type != "cpu":
        raise TypeError(f"plan must be a plan of er_sde_plan on the CPU, got {type(plan).__name__}")
    wanted = "seeds must be a list or range of at least one whole number"
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        remedy = ": use seeds.tolist()" if hasattr(seeds, "tolist") else ""
        got = f"{seeds}: write range({seeds})" if is_whole(seeds) else f"{type(seeds).__name__}{remedy}"
        raise TypeError(f"{wanted}, got {got}")
    seeds = list(seeds)
    if not seeds or not all(map(is_whole, seeds)):
        raise TypeError(f"{wanted}, got {next((seed for seed in seeds if not is_whole(seed)), seeds)!r}")
    seeds = [int(seed) % 2**64 for seed in seeds]
    if len(set(seeds)) < len(seeds):
        twice = next(seed for k, seed in enumerate(seeds) if seed in seeds[:k])
        raise ValueError(f"seeds must differ (mod 2^64), got {twice} twice")
    if not isinstance(shape, Sequence) or not all(is_whole(n) and n > 0 for n in shape):
        raise ValueError(f"shape must hold the positive sizes of one sample, got {shape!r}")
    if not is_whole(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    return seeds, tuple(map(int, shape))  # a run's fingerprint takes Python's numbers


def _processes() -> tuple[int, int, dist.ProcessGroup | None]:
    """Rank, number of processes, and a group of the host's for what generate has to say."""
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise RuntimeError(
                'torch.distributed is not initialized in one of several processes: call init_process_group first, with "gloo"'
            )
        return 0, 1, None
    world = dist.get_world_size()
    return dist.get_rank(), world, dist.new_group(backend="gloo") if world > 1 else None


def _from_first(function: Callable, rank: int, group):
    """What a function returns or raises in the first process, in every process."""
    message: list[Any] = [None, None]
    if rank == 0:
        try:
            message[0] = function()
        except Exception as error:  # which the others raise too, rather than wait
            message[1] = error
    if group is not None:
        dist.broadcast_object_list(message, group=group, group_src=0)
    if message[1] is not None:
        raise message[1]
    return message[0]


class _Sums:
    """What the processes add up after each round, heard one round later: none waits for the others but when it is a round ahead."""

    def __init__(self, rank: int, group, folder: Path, written: int):
        self.rank, self.group, self.folder, self.written = rank, group, folder, written
        self.total: Tensor | None = None
        self.work = None

    def say(self, samples: int, failed: bool) -> None:
        self.total = torch.tensor([samples, failed], device="cpu")
        self.work = None if self.group is None else dist.all_reduce(self.total, group=self.group, async_op=True)

    def hear(self, own_error: BaseException | None = None) -> int:
        """The samples of the round last said; an error if a process failed in it or has died."""
        if self.total is None:
            return 0
        try:
            if self.work is not None:
                self.work.wait()
        except RuntimeError as error:
            raise own_error or RuntimeError(self._kept(f"another process than rank {self.rank} has died")) from error
        samples, failed = self.total.tolist()
        self.total, self.written = None, self.written + samples
        if failed:
            raise own_error or RuntimeError(self._kept(f"{failed} of the other processes failed: see their messages"))
        return samples

    def _kept(self, what: str) -> str:
        return f"{what}; at least {self.written} samples are in {self.folder}: call generate again for the rest"


def _fingerprint(plan: Plan, shape: tuple[int, ...], dtype: torch.dtype, prediction_type: str | None) -> str:
    """Of all that a sample depends on but its seed and the model: the plan's numbers as precisely as steps of that dtype take them.

    So an ulp of float64 between two machines, which no float32 sample shows, makes no other run.
    """
    precision = torch.promote_types(dtype, torch.float32)
    numbers = b"".join(values.to(precision).numpy().tobytes() for values in (plan.sigmas, plan.weights))
    words = [plan.first_step, shape, str(dtype)]
    if prediction_type is not None:
        words += [prediction_type, plan.sigma_data]
    return hashlib.sha256(numbers + json.dumps(words).encode()).hexdigest()


def _sample(model, plan, seeds, shape, extra_args, prediction_type, dtype, device) -> Tensor:
    x = plan.sigmas[0].item() * portable_noise((len(seeds), *shape), seeds, step=-1, device=device)
    told, source = extra_args(seeds) if extra_args else None, Source(seed=seeds)
    if told is not None and not isinstance(told, dict):
        raise TypeError(f"extra_args must return a dict of further arguments of model, got {type(told).__name__}")
    return sample_plan(plan, model, x.to(dtype), told, disable=True, source=source, returns=Output(prediction_type))


def _transformed(x: Tensor, transform) -> Tensor:
    samples = x if transform is None else transform(x)
    if not isinstance(samples, Tensor) or samples.dim() == 0:
        raise TypeError(f"transform must return a tensor [batch, ...], got {type(samples).__name__}{inside(samples)}")
    if len(samples) != len(x):
        raise ValueError(f"transform must return one result a sample, {len(x)}, got {len(samples)}")
    kept = samples.to("cpu", copy=transform is not None)  # a transform may use its memory again, while this is being written
    return kept.contiguous()


def _prepare(folder: Path, run: str, seeds: list[int]) -> set[int]:
    """Makes the folder ready, and says which seeds it holds."""
    safetensors_for("generate")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(".*.partial"):
            partial.unlink()
        write_whole(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise OSError(f"out_dir must be a folder that can be written, got {folder}: {error}") from None
    return {seed for held in _held(folder, run).values() for seed in held} & set(seeds)


def _held(folder: Path, run: str) -> dict[str, list[int]]:
    """The seeds in each finished file of a run."""
    held: dict[str, list[int]] = {}
    where: dict[int, Path] = {}
    for path in sorted(folder.glob("samples-*.safetensors")):
        metadata, _, seeds = _read(path, header_only=True)
        if metadata.get("run") != run:
            raise ValueError(f"{path} is of a run with another plan, shape, dtype or prediction_type: name another out_dir")
        for seed in seeds:
            if seed in where:
                raise ValueError(f"{path} and {where[seed]} both hold seed {seed}: delete one of them")
            where[seed] = path
        held[path.name] = seeds
    return held


def _read(path: Path, header_only: bool = False):
    """(metadata, samples, seeds) of a file; the samples' shape alone where only the header is wanted."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            seeds = [seed % 2**64 for seed in file.get_tensor("seeds").tolist()]
            samples = file.get_slice("samples").get_shape() if header_only else file.get_tensor("samples")
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: call generate again") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: delete it and call generate again ({error})") from None
    if len(seeds) != (samples[0] if header_only else len(samples)):
        raise ValueError(f"{path} is damaged: it has {len(seeds)} seeds for other samples: delete it and call generate again")
    return metadata, samples, seeds


def _write(path: Path, seeds: list[int], samples: Tensor, run: str) -> int:
    """Writes a batch; how many samples that are."""
    tensors = {"samples": samples, "seeds": seed_table(seeds, len(seeds))[:, 0].contiguous()}
    write_whole(path, safetensors_for("generate").save(tensors, metadata={"run": run}))
    return len(seeds)


def _write_index(folder: Path, run: str, seeds: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    files = _held(folder, run)
    if lacking := set(seeds) - {seed for held in files.values() for seed in held}:
        raise ValueError(f"{folder} has lost the sample of seed {min(lacking)}: call generate again")
    said = {"run": run, "shape": shape, "dtype": str(dtype), "seeds": seeds, "files": files}
    write_whole(folder / INDEX, json.dumps(said).encode())
