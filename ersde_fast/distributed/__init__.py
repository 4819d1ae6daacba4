"""Many processes, on torch.distributed: samples by the ten thousand, and latents split over devices.

No result depends on how the work was split.
"""

from .generation import generate, load_samples
from .split import fast_step_dtensor, portable_noise_dtensor, shard_of

__all__ = ["fast_step_dtensor", "generate", "load_samples", "portable_noise_dtensor", "shard_of"]
