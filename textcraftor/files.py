"""Write files atomically: under a temporary name first, renamed when complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from textcraftor.errors import UserError


@contextlib.contextmanager
def write_whole(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder, with the same suffix; rename it to `path` when the block ends.

    Nobody ever sees half a file: if the block raises, the temporary file is removed and an existing `path` is kept.
    Creates folders as needed. Raises UserError if the file system refuses (full, read-only, no permission).
    """
    path = Path(path)
    unfinished = path.with_name(f".unfinished.{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except OSError as problem:
        raise UserError(f"{path}: cannot be written ({problem.strerror or problem})") from problem
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def free_bytes(folder: Path | str) -> int:
    """Free space, in bytes, on the disk that holds `folder`, which need not exist yet."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free
