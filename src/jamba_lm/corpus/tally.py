"""Counts of what was kept and dropped and why, with a few samples of each.

The counts of several tasks add up to what one task would have counted, and the samples are those
of the smallest hashes, so that neither depends on how the work was cut. Knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def _add(total: dict[str, int], more: Mapping[str, int]) -> None:
    for key, count in more.items():
        total[key] = total.get(key, 0) + count


class Tally:
    """What became of the documents of each source at each stage.

    Attributes:
        rows: by source and stage: documents and bytes that came in, that went out, dropped
            documents by reason, and what the stage counted itself.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.rows: dict[str, dict[str, Json]] = {}

    def row(self, source: str, stage: str) -> Json:
        """Return the counts of one stage on one source."""
        stages = self.rows.setdefault(source, {})
        if stage not in stages:
            stages[stage] = {
                "documents_in": 0,
                "bytes_in": 0,
                "documents_out": 0,
                "bytes_out": 0,
                "dropped": {},
                "counts": {},
                "samples": {},
            }
        return stages[stage]

    def kept(self, source: str, stage: str, bytes_in: int, bytes_out: int) -> None:
        """Count a document that passed."""
        row = self.row(source, stage)
        row["documents_in"] += 1
        row["bytes_in"] += bytes_in
        row["documents_out"] += 1
        row["bytes_out"] += bytes_out

    def dropped(self, source: str, stage: str, reason: str, bytes_in: int, sample: Json) -> None:
        """Count a document that did not, and keep it as a sample if it is one of the first."""
        row = self.row(source, stage)
        row["documents_in"] += 1
        row["bytes_in"] += bytes_in
        _add(row["dropped"], {reason: 1})
        self._sample(row, reason, [sample])

    def show(self, source: str, stage: str, reason: str, sample: Json) -> None:
        """Keep a sample of something that is counted elsewhere."""
        self._sample(self.row(source, stage), reason, [sample])

    def count(self, source: str, stage: str, counts: Mapping[str, int]) -> None:
        """Add what a stage counted itself."""
        _add(self.row(source, stage)["counts"], counts)

    def wants(self, source: str, stage: str, reason: str, key: str) -> bool:
        """Say whether a sample with this key would be kept: making one may cost something."""
        have = self.row(source, stage)["samples"].get(reason, [])
        return len(have) < self._samples or (bool(have) and key < have[-1]["key"])

    def _sample(self, row: Json, reason: str, samples: list[Json]) -> None:
        if not self._samples:
            return
        # By key and place: copies of one text have one key.
        have = [*row["samples"].get(reason, []), *samples]
        have.sort(key=lambda one: (one["key"], one["place"]))
        row["samples"][reason] = have[: self._samples]

    def merge(self, rows: Mapping[str, Mapping[str, Json]]) -> None:
        """Add the counts of another tally."""
        for source, stages in rows.items():
            for stage, other in stages.items():
                row = self.row(source, stage)
                for key in ("documents_in", "bytes_in", "documents_out", "bytes_out"):
                    row[key] += other[key]
                _add(row["dropped"], other["dropped"])
                _add(row["counts"], other["counts"])
                for reason, samples in other["samples"].items():
                    self._sample(row, reason, samples)
