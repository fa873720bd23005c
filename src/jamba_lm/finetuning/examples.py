"""Records as ids, with a mark at every token that is to be learned.

Knows tokenizers and records, and nothing of batches and models.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jamba_lm.errors import DataError, InputError, TokenizerError
from jamba_lm.finetuning.records import BadRecord, read_records
from jamba_lm.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Ids = np.ndarray[tuple[int], np.dtype[np.int32]]
Marks = np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence to learn from.

    Attributes:
        ids: with the beginning token.
        learned: whether each is to be predicted from those before it; never the first.
    """

    ids: Ids
    learned: Marks


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """The examples of one side of the split, and what became of its records.

    Attributes:
        examples: in the order of the files.
        counts: how many records were read, were used, and were left out for which reason.
        num_bytes: UTF-8 bytes of what is to be learned, control tokens apart.
        turn_ends: ids of control tokens that answers end with.
    """

    examples: Sequence[Example]
    counts: Mapping[str, int]
    num_bytes: int
    turn_ends: frozenset[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(one.ids) for one in self.examples)

    @property
    def num_learned(self) -> int:
        """Tokens that are to be predicted."""
        return int(sum(one.learned.sum() for one in self.examples))

    def fingerprint(self) -> str:
        """Name the contents, so that a resumed run can tell that it reads the same."""
        digest = hashlib.sha256()
        for one in self.examples:
            digest.update(len(one.ids).to_bytes(8, "little"))
            digest.update(one.ids.tobytes())
            digest.update(one.learned.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ExampleRules:
    """How records become examples; see `recipe.TuningData`."""

    sequence_tokens: int
    last_answer_only: bool = False
    drop_bad: bool = False
    drop_duplicates: bool = True


def read_examples(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    rules: ExampleRules,
    what: str,
    *,
    known: frozenset[bytes] = frozenset(),
) -> tuple[Examples, frozenset[bytes]]:
    """Read and tokenize every record of `paths`.

    Args:
        paths: files that `read_records` takes.
        tokenizer: of the model that is tuned.
        rules: how.
        what: what the data is for, for the messages: "training".
        known: digests of records that are held out, which are dropped here.

    Returns:
        The examples, and a digest of each record.

    Raises:
        DataError: a file is unusable, a record is bad and bad ones are refused, or none is left.
        TokenizerError: the tokenizer has no token to mark a beginning or an end with.
    """
    if tokenizer.bos_id is None or not tokenizer.eos_ids:
        raise TokenizerError(
            "the tokenizer names no beginning-of-sequence or no end token: give both in its "
            "tokenizer_config.json"
        )
    counts: Counter[str] = Counter()
    bad: list[str] = []
    examples: list[Example] = []
    seen: set[bytes] = set()
    for path in paths:
        for record in read_records(path):
            counts["read"] += 1
            try:
                found = list(_examples_of(record.value(), tokenizer, rules))
            except BadRecord as problem:
                counts[problem.kind] += 1
                bad.append(f"{record.where}: {problem.reason}")
                continue
            digest = _digest(found)
            if digest in known:
                counts["held out"] += 1
                continue
            if rules.drop_duplicates and digest in seen:
                counts["duplicate"] += 1
                continue
            seen.add(digest)
            counts["used"] += 1
            examples += found
    _judge(bad, counts, rules, what, paths)
    return (
        Examples(examples, counts, _learned_bytes(examples, tokenizer), _ends(examples, tokenizer)),
        frozenset(seen),
    )


def _judge(
    bad: Sequence[str],
    counts: Mapping[str, int],
    rules: ExampleRules,
    what: str,
    paths: Sequence[Path],
) -> None:
    number = len(bad)
    if bad and not rules.drop_bad:
        more = f", and {number - 1:,} more" if number > 1 else ""
        raise DataError(
            f"{number:,} of {counts['read']:,} {what} records cannot be used: {bad[0]}{more}; mend "
            'them, or set data.bad_records = "dropped"'
        )
    if not counts.get("used"):
        names = ", ".join(map(str, paths))
        found = ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "nothing read"
        why = f": {bad[0]}" if bad else ""
        raise DataError(f"no usable {what} record in {names} ({found}){why}")
    if bad:
        logger.warning("%d %s records were dropped, the first: %s", number, what, bad[0])


def _examples_of(
    value: Mapping[str, Any], tokenizer: Tokenizer, rules: ExampleRules
) -> Iterator[Example]:
    try:
        if "text" in value:
            yield from _of_text(value["text"], tokenizer, rules.sequence_tokens)
            return
        if "messages" in value:
            parts = tokenizer.chat_parts(
                value["messages"], last_only=rules.last_answer_only, tools=value["tools"]
            )
            pieces = [(one.ids, one.num_learned) for one in parts]
        else:
            prompt, answer = tokenizer.encode_parts([value["prompt"], value["completion"]])
            answer = [*answer, tokenizer.eos_ids[0]]
            pieces = [(prompt, 0), (answer, len(answer))]
    except (InputError, TokenizerError) as problem:
        raise BadRecord("malformed", str(problem)) from problem
    example = _joined(pieces, tokenizer)
    if len(example.ids) > rules.sequence_tokens:
        raise BadRecord(
            "too long",
            f"it has {len(example.ids):,} tokens, more than data.sequence_tokens "
            f"({rules.sequence_tokens:,})",
        )
    yield example


def _joined(pieces: Sequence[tuple[list[int], int]], tokenizer: Tokenizer) -> Example:
    ids: list[int] = []
    learned: list[bool] = []
    for piece, count in pieces:
        ids += piece
        learned += [True] * count + [False] * (len(piece) - count)
    if ids[0] != tokenizer.bos_id:
        # Every sequence that the model was trained on began so.
        assert tokenizer.bos_id is not None
        ids, learned = [tokenizer.bos_id, *ids], [False, *learned]
    marks = np.array(learned, dtype=np.bool_)
    marks[0] = False
    # What comes after the last token that is learned changes nothing.
    end = 1 + int(marks.nonzero()[0].max(initial=0))
    if end == 1:
        raise BadRecord("empty", "holds nothing to learn")
    return Example(np.array(ids[:end], dtype=np.int32), marks[:end])


def _of_text(text: str, tokenizer: Tokenizer, sequence_tokens: int) -> Iterator[Example]:
    """Cut a text into pieces, each after a beginning token, all of it to be learned."""
    ids = [*tokenizer.encode(text, add_bos=False), tokenizer.eos_ids[0]]
    for first in range(0, len(ids), sequence_tokens - 1):
        piece = ids[first : first + sequence_tokens - 1]
        yield _joined([([int(tokenizer.bos_id or 0)], 0), (piece, len(piece))], tokenizer)


def _digest(record: Sequence[Example]) -> bytes:
    digest = hashlib.sha256()
    for one in record:
        digest.update(one.ids.tobytes() + one.learned.tobytes())
    return digest.digest()


def _learned_bytes(examples: Sequence[Example], tokenizer: Tokenizer) -> int:
    counts: Counter[int] = Counter()
    for one in examples:
        counts.update(one.ids[one.learned].tolist())
    total = 0
    for token, number in counts.items():
        if token not in tokenizer.special_ids:
            total += number * len(tokenizer.token_bytes(token) or b"")
    return max(total, 1)


def _ends(examples: Sequence[Example], tokenizer: Tokenizer) -> frozenset[int]:
    """Return the control tokens behind which somebody else goes on."""
    ends: set[int] = set()
    for one in examples:
        last = one.learned & ~np.append(one.learned[1:], False)
        ends.update(one.ids[last].tolist())
    return frozenset(ends & tokenizer.special_ids)
