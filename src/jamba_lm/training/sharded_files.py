"""A checkpoint in a folder: each process writes its boxes of the tensors, any number reads them.

    step-000000004/
        index.json                          what the run was, and how long each part is
        part-00000-of-00002.safetensors     boxes; in what each lies and where is in the header
        part-00001-of-00002.safetensors

A reader takes what overlaps with the boxes that it wants, so that a run may go on with other
processes than it was saved by. Nothing is pickled. Knows names, boxes and files, and nothing of
optimizers and processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jamba_lm.errors import CheckpointError
from jamba_lm.files import parse_json, read_json, sync_folder, write_json
from jamba_lm.tensor_file import TensorFile, write_tensors
from jamba_lm.training.places import Place

FORMAT = "jamba_lm training in parts 1"
INDEX = "index.json"


def part_name(number: int, count: int) -> str:
    """Return the name of the file that a process writes."""
    return f"part-{number:05d}-of-{count:05d}.safetensors"


def write_part(
    folder: Path,
    number: int,
    count: int,
    tensors: Mapping[str, Tensor],
    places: Mapping[str, tuple[str, Place]],
) -> None:
    """Write what one process holds.

    Args:
        folder: of the checkpoint.
        number: of the process.
        count: of processes.
        tensors: by names of its own, in which no two boxes of one tensor are alike.
        places: for each of them, of which tensor it is a box, and where.

    Raises:
        InputError: the operating system refused.
    """
    where = {name: [whole, place.shape, place.offset] for name, (whole, place) in places.items()}
    where = {name: where[name] for name in tensors}
    metadata = {"format": FORMAT, "places": json.dumps(where)}
    write_tensors(folder / part_name(number, count), tensors, metadata)


def write_index(folder: Path, count: int, metadata: Mapping[str, str]) -> None:
    """Write what holds the parts together, after all of them.

    Raises:
        CheckpointError: a part is not to be seen from here.
        InputError: the operating system refused.
    """
    parts = {}
    for number in range(count):
        path = folder / part_name(number, count)
        if not path.is_file():
            raise CheckpointError(
                f"process {number} wrote its part of {str(folder)!r}, but it is not there for "
                "process 0: --out must be a folder that all machines share"
            )
        parts[path.name] = path.stat().st_size
    write_json(folder / INDEX, {"format": FORMAT, "metadata": dict(metadata), "parts": parts})
    sync_folder(folder)


def read_index(folder: Path) -> tuple[dict[str, Any], StoredTensors]:
    """Open a checkpoint.

    Returns:
        The metadata, and the tensors, of which nothing is read yet.

    Raises:
        CheckpointError: a part is missing, cut short or not what the index says.
    """
    index = read_json(folder / INDEX, "index of a training checkpoint", CheckpointError)
    what = f"{str(folder / INDEX)!r}"
    if index.get("format") != FORMAT:
        raise CheckpointError(
            f"{what} is not of a training checkpoint of this version: its format is "
            f"{index.get('format')!r}, expected {FORMAT!r}"
        )
    parts, metadata = index.get("parts"), index.get("metadata")
    if not (isinstance(parts, dict) and parts and isinstance(metadata, dict)):
        raise CheckpointError(f"{what} lacks its parts or its metadata: was it edited?")
    files = []
    for name, size in parts.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise CheckpointError(
                f"{str(path)!r} is missing, one of {len(parts)} parts of this checkpoint: bring "
                "it back, or remove the folder to resume from an older checkpoint"
            )
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{str(path)!r} has {path.stat().st_size:,} bytes, but was written with {size:,}: "
                "remove the folder to resume from an older checkpoint"
            )
        files.append(TensorFile(path))
    return metadata, StoredTensors(files)


@dataclass(frozen=True, slots=True)
class _Box:
    """Where a box lies, and what it is called in which file."""

    place: Place
    file: TensorFile
    key: str


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint in parts, put together from their boxes when they are asked for.

    Attributes:
        shapes: of whole tensors, by name.
    """

    def __init__(self, files: list[TensorFile]) -> None:
        """Find out which box is where, and that the boxes fill every tensor.

        Raises:
            CheckpointError: they do not, or lie outside.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._boxes: dict[str, list[_Box]] = {}
        for file in files:
            self._take_in(file)
        for name, shape in self.shapes.items():
            found = sum(box.place.num_values for box in self._boxes[name])
            wanted = Place.whole(shape).num_values
            if found != wanted:
                raise CheckpointError(
                    f"the parts of {str(files[0].path.parent)!r} hold {found:,} of the {wanted:,} "
                    f"values of {name!r}: are they all of the same checkpoint?"
                )

    def _take_in(self, file: TensorFile) -> None:
        what = f"places in the metadata of {str(file.path)!r}"
        where = parse_json(file.metadata.get("places", "").encode(), what, CheckpointError)
        for key in file.names:
            whole, shape, offset = _where(where.get(key), key, what)
            place = Place(_shape(key, shape), _shape(key, offset), file.shape(key))
            if place.shape != self.shapes.setdefault(whole, place.shape) or not place.fits:
                raise CheckpointError(
                    f"{str(file.path)!r} holds a part of {whole!r} that does not lie in it: is it "
                    "of this checkpoint?"
                )
            self._boxes.setdefault(whole, []).append(_Box(place, file, key))

    def __getitem__(self, name: str) -> Tensor:
        return self.part(name, Place.whole(self.shapes[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor without reading it."""
        box = self._boxes[name][0]
        return box.file.dtype(box.key)

    def part(self, name: str, wanted: Place) -> Tensor:
        """Return one box of a tensor.

        Raises:
            CheckpointError: boxes overlap, so that some of it is missing.
        """
        values = torch.empty(wanted.size, dtype=self.dtype(name))
        filled = torch.zeros(wanted.size, dtype=torch.bool)
        for box in self._boxes[name]:
            meeting = box.place.overlap(wanted)
            if meeting is None:
                continue
            theirs, ours = meeting
            piece = box.file.tensor(box.key)[theirs]
            if box.place == wanted:
                return piece
            values[ours] = piece
            filled[ours] = True
        if not filled.all():
            raise CheckpointError(
                f"the parts of {name!r} overlap: remove the checkpoint to resume from an older one"
            )
        return values


def part_of(tensors: Mapping[str, Tensor], name: str, place: Place) -> Tensor:
    """Return one box of a saved tensor, and read no more than that."""
    if isinstance(tensors, StoredTensors):
        return tensors.part(name, place)
    return place.cut_from(tensors[name])


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a saved tensor without reading it."""
    if isinstance(tensors, StoredTensors):
        return tensors.shapes[name]
    return tuple(tensors[name].shape)


def dtype_of(tensors: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Return the type of a saved tensor without reading it."""
    return tensors.dtype(name) if isinstance(tensors, StoredTensors) else tensors[name].dtype


def _where(value: Any, key: str, what: str) -> tuple[str, Any, Any]:
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
        return value[0], value[1], value[2]
    raise CheckpointError(f"{what} do not say where {key!r} lies")


def _shape(name: str, value: Any) -> tuple[int, ...]:
    good = isinstance(value, (list, tuple)) and all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value
    )
    if not good:
        raise CheckpointError(f"the shape of {name!r} is {value!r}: expected sizes")
    return tuple(value)
