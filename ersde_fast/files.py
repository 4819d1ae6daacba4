"""Files that are there whole or not at all, and safetensors, which not everybody has installed."""

import os
import threading
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, whatever ends the process or the machine.

    Raises:
        OSError: naming the file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write {path}: {error.strerror}") from None


def safetensors_for(what: str):
    """`safetensors.torch`; `what` says in the error what needs it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f'{what} needs safetensors: pip install safetensors, or "ersde-fast[edm]"') from error
    return safetensors.torch
