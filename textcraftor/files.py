"""Write files atomically (temporary name first, then renamed), read JSON with clear errors, check disk space."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from textcraftor.errors import UserError, first_line


@contextlib.contextmanager
def write_whole(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder, with the same suffix; rename it to `path` when the block ends.

    Nobody ever sees half a file: if the block raises, the temporary file is removed and an existing `path` is kept.
    Creates folders as needed. The block writes a file, or a folder of files, which get the permissions of any new file
    (the umask), although safetensors makes files that only their owner can read. Raises UserError if the file system
    refuses (full, read-only, no permission).
    """
    path = Path(path)
    unfinished = path.with_name(f".unfinished.{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        permissions = unfinished.stat().st_mode
        unfinished.unlink()
        yield unfinished
        for written in (unfinished, *unfinished.rglob("*")):
            if written.is_file():
                written.chmod(permissions)
        os.replace(unfinished, path)
    except OSError as problem:
        raise UserError(f"{path}: cannot be written ({problem.strerror or problem})") from problem
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def read_json_object(path: Path | str, advice: str) -> dict:
    """The object in a JSON file; UserError ending in `advice` if the file cannot be read or holds something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        reason = getattr(problem, "strerror", None) or first_line(problem)
        raise UserError(f"{path}: cannot be read ({reason}); {advice}") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}; {advice}")
    return content


def write_json(path, content):
    """Write a JSON file, whole or not at all. A path that is not UTF-8 becomes escapes."""
    with write_whole(path) as unfinished:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


def free_bytes(folder: Path | str) -> int:
    """Free space, in bytes, on the disk that holds `folder`, which need not exist yet."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free


def check_picture_name(path: Path, option: str) -> None:
    """Raise UserError unless `path` is a name for a PNG file in a folder that can be written to."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{option} {path}: expected a name that ends in .png")
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; expected the name of a picture")
    check_writable(path.parent, option)


def check_writable(folder: Path | str, option: str) -> None:
    """Raise UserError unless files can be written in `folder`, which is not made if it does not exist yet.

    It writes a file in the nearest folder that exists and removes it again: permissions alone say nothing about
    read-only disks and special file systems. option: the flag that names the folder, for the message.
    """
    folder = Path(os.path.abspath(folder))
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise UserError(f"{option} {folder}: {existing} is a file; choose a folder")
    try:
        with TemporaryDirectory(prefix=".textcraftor-", dir=existing) as trial:
            inner = Path(trial, folder.relative_to(existing))
            inner.mkdir(parents=True, exist_ok=True)
            inner.joinpath("file").touch()
    except OSError as problem:
        raise UserError(
            f"{option} {folder}: cannot write in {existing} ({problem.strerror}); choose another folder"
        ) from problem
