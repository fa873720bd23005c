"""A folder that appears whole or not at all.

Knows nothing of what is written into it; the caller says which old files it replaces.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jamba_lm.errors import InputError
from jamba_lm.files import sync_folder


@contextmanager
def appearing_whole(
    target: str | Path, *, replaces: Callable[[str], bool], overwrite: bool = False
) -> Iterator[Path]:
    """Give a folder beside `target` to write into, and put it in place when all went well.

    On any failure, Ctrl-C included, nothing is left behind and `target` is as it was. A killed
    process can leave a hidden `.NAME.*.partial` folder beside `target`, never half a `target`.

    Args:
        target: the folder to make; its parents are made as needed.
        replaces: tells, by name, which files of an overwritten folder are the old version of
            what is being written; all others (a tokenizer, a model card) are kept.
        overwrite: replace a checkpoint that is there already.

    Raises:
        InputError: `target` is a file, or a folder that is not empty and must not (or, as it
            holds no checkpoint, may not) be overwritten; or the operating system refused.
    """
    path = Path(target).resolve()
    check_target(path, overwrite=overwrite)
    token = secrets.token_hex(8)
    partial = path.with_name(f".{path.name[:100]}.{token}.partial")
    replaced = path.with_name(f".{path.name[:100]}.{token}.replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        sync_folder(partial)
        if path.is_dir() and any(path.iterdir()):
            _swap(partial, path, replaced, replaces)
        else:
            partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r}: {error.strerror or error}; "
            "check its parent folder, the permissions and the free space"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: str | Path, *, overwrite: bool) -> None:
    """Refuse a target that must not be written, before any work goes into what to write.

    Raises:
        InputError: as in `appearing_whole`.
    """
    path = Path(target)
    if path.exists() and not path.is_dir():
        raise InputError(f"{str(path)!r} is a file: expected a folder to write a checkpoint into")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / "config.json").is_file():
        raise InputError(
            f"{str(path)!r} is not empty and holds no checkpoint (no config.json): "
            "choose a new or an empty folder"
        )
    if not overwrite:
        raise InputError(
            f"{str(path)!r} already holds a checkpoint: choose another folder, "
            "or ask to overwrite this one"
        )


def _swap(partial: Path, path: Path, replaced: Path, replaces: Callable[[str], bool]) -> None:
    # A kill between the two renames leaves both versions beside `path`, each of them whole.
    path.rename(replaced)
    try:
        partial.rename(path)
    except BaseException:
        replaced.rename(path)
        raise
    for old in replaced.iterdir():
        if not replaces(old.name) and not (path / old.name).exists():
            old.rename(path / old.name)
    shutil.rmtree(replaced)
