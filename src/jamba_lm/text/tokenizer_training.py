"""Trains the tokenizer that the paper describes: BPE over all text, every digit on its own.

Reads the corpus as a stream and never holds it as a whole. Knows nothing about models;
`tokenizer.py` reads what this writes.

Paper: Jamba (2403.19887) §3: BPE, 64K entries, each digit a separate token, no dummy space in
front of a text, "for more consistent and reversible tokenization".
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jamba_lm.errors import DataError, InputError
from jamba_lm.files import path_kind, sync_folder, write_json
from jamba_lm.text.chat_template import CHATML_TEMPLATE
from jamba_lm.text.corpus import read_pieces, total_bytes

KINDS = ("byte-level", "byte-fallback")
Pair = tuple[str, str]
ReportProgress = Callable[[int, int], None]

PAD, BOS, EOS = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
CHAT_START, CHAT_END = "<|im_start|>", "<|im_end|>"

# Where text is cut before merging, so that no token reaches across: a word with the one character
# in front of it (usually a space), one digit, punctuation with the line ends behind it, line ends,
# other white space. What matches nothing is cut out too, so nothing is ever lost.
PRE_TOKEN_PATTERN = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A letter between the brackets keeps the name out of reach of merges: the pattern above cuts it.
SPECIAL_PATTERN = re.compile(r"<[|/]?[a-z_]+\|?>")

MAX_VOCAB = 2**20
# Rows of dashes would otherwise fill the vocabulary.
MAX_TOKEN_CHARACTERS = 32
# Byte-fallback: one entry in so many may be a single character; rarer ones are spelled in bytes.
ALPHABET_SHARE = 4
# One piece in so many is kept out of training to measure on, up to this much text.
HELD_OUT_EVERY = 50
HELD_OUT_CHARACTERS = 2**21


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRecipe:
    """What to train.

    Attributes:
        vocab_size: entries in all, special tokens and bytes included.
        kind: "byte-level" spells every text in 256 byte symbols and merges those; "byte-fallback"
            merges characters and spells the ones it does not know in bytes, as SentencePiece does.
        specials: tokens to reserve behind pad, bos, eos, <|im_start|> and <|im_end|>.
        field: the key of the text in .jsonl files.
    """

    vocab_size: int = 65536
    kind: str = "byte-level"
    specials: tuple[str, ...] = ()
    field: str = "text"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"no tokenizer kind {self.kind!r}: choose {' or '.join(KINDS)}")
        for token in self.specials:
            if not SPECIAL_PATTERN.fullmatch(token) or len(token) > 64:
                raise InputError(
                    f"cannot reserve {token!r}: expected a name like <|tool|> or <think>, of small "
                    "letters and underscores, at most 64 characters"
                )
        if len(set(self.special_tokens)) < len(self.special_tokens):
            raise InputError(
                f"a special token is given twice among {', '.join(self.special_tokens)}"
            )
        smallest = len(self.special_tokens) + 256 + 1
        if not smallest <= self.vocab_size <= MAX_VOCAB:
            raise InputError(
                f"a vocabulary of {self.vocab_size:,} is impossible: expected {smallest:,} "
                f"(special tokens, 256 bytes and one more) to {MAX_VOCAB:,}"
            )

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens; the place of each is its id."""
        return (PAD, BOS, EOS, CHAT_START, CHAT_END, *self.specials)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTokenizer:
    """What came of a training.

    Attributes:
        vocab_size: entries, as asked for.
        num_characters: length of the text that was counted.
        seconds: wall-clock time.
        held_out: text that was not trained on, for measuring; empty when there was too little.
    """

    vocab_size: int
    num_characters: int
    seconds: float
    held_out: tuple[str, ...]


def train_tokenizer(
    files: Sequence[Path],
    out: Path,
    recipe: TokenizerRecipe,
    *,
    hold_out: bool = True,
    progress: ReportProgress | None = None,
) -> TrainedTokenizer:
    """Train on `files` and write the folder `out`, all at once or not at all.

    The same files in the same order give the same bytes.

    Args:
        files: UTF-8 text files or .jsonl files.
        out: a folder that does not exist yet, or is empty.
        recipe: what to train.
        hold_out: keep one piece of text in 50 out of training, to measure on.
        progress: called with the bytes read so far and the bytes in all.

    Raises:
        InputError: `out` is taken or cannot be written.
        DataError: a file cannot be used, or the text is too little for the vocabulary.
    """
    if not files:
        raise InputError("no text to train on: give one file or more")
    _check_free(out)
    started = time.monotonic()
    corpus = _Corpus(files, recipe.field, hold_out=hold_out, progress=progress)
    # The folder comes first: that it cannot be made should not be found out after the work.
    with _new_folder(out) as folder:
        pieces, merges = _learn_merges(recipe, corpus)
        document = _tokenizer_json(recipe, pieces, merges)
        write_json(folder / "tokenizer.json", document)
        write_json(folder / "tokenizer_config.json", _tokenizer_config(recipe))
    return TrainedTokenizer(
        vocab_size=len(document["model"]["vocab"]),
        num_characters=corpus.num_characters,
        seconds=time.monotonic() - started,
        held_out=tuple(corpus.held_out),
    )


class _Corpus:
    """The pieces of the files, less the ones that are held out; may be gone through again."""

    def __init__(
        self,
        files: Sequence[Path],
        field: str,
        *,
        hold_out: bool,
        progress: ReportProgress | None,
    ) -> None:
        self.held_out: list[str] = []
        self.num_characters = 0
        self._files = files
        self._field = field
        self._room = HELD_OUT_CHARACTERS if hold_out else 0
        self._progress = progress

    def __iter__(self) -> Iterator[str]:
        self.held_out, self.num_characters, room = [], 0, self._room
        number, before, total = 0, 0, total_bytes(self._files)
        for path in self._files:
            done = 0
            for text, done in read_pieces(path, field=self._field):
                number += 1
                if number % HELD_OUT_EVERY == 0 and len(text) <= room:
                    room -= len(text)
                    self.held_out.append(text)
                else:
                    self.num_characters += len(text)
                    yield text
                if self._progress is not None:
                    self._progress(before + done, total)
            before += done


def _learn_merges(recipe: TokenizerRecipe, corpus: _Corpus) -> tuple[list[str], list[Pair]]:
    """Return the learned entries in the order of their ids, and the merges that build them."""
    num_reserved = len(recipe.special_tokens)
    byte_level = recipe.kind == "byte-level"
    if not byte_level:
        num_reserved += 256
    size = recipe.vocab_size - num_reserved
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer(recipe.kind)
    if byte_level:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        alphabet = _commonest_characters(corpus, max(1, size // ALPHABET_SHARE))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        max_token_length=MAX_TOKEN_CHARACTERS,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    learner.train_from_iterator(iter(corpus), trainer)
    model = json.loads(learner.to_str())["model"]
    if len(model["vocab"]) < size:
        raise DataError(
            f"the text supports a vocabulary of {len(model['vocab']) + num_reserved:,} only, not "
            f"of {recipe.vocab_size:,}: give more text, or ask for a smaller vocabulary"
        )
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in model["merges"]]


def _commonest_characters(texts: Iterable[str], limit: int) -> list[str]:
    """Return the characters worth an entry of their own; equally common ones in code point order.

    The library would choose among equally common ones by the order of a hash table, which is
    another one in every process.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    return sorted(counts, key=lambda character: (-counts[character], character))[:limit]


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(PRE_TOKEN_PATTERN), behavior="isolated")
    if kind == "byte-fallback":
        return split
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, spell])


def _tokenizer_json(
    recipe: TokenizerRecipe, pieces: Sequence[str], merges: Sequence[Pair]
) -> dict[str, Any]:
    """Return the contents of tokenizer.json: special tokens, bytes, then what was learned.

    Spaces stay spaces in the byte-fallback kind. SentencePiece writes them as U+2581, and then a
    text that holds U+2581 does not survive the round trip.
    """
    byte_level = recipe.kind == "byte-level"
    bytes_256 = [] if byte_level else [f"<0x{value:02X}>" for value in range(256)]
    entries = [*recipe.special_tokens, *bytes_256, *pieces]
    assert len(set(entries)) == len(entries), "a learned entry has the name of a special token"
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(entries)},
            merges=list(merges),
            byte_fallback=not byte_level,
        )
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(recipe.kind)
    tokenizer.decoder = (
        decoders.ByteLevel()
        if byte_level
        else decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    )
    # Other libraries add the BOS that Jamba wants through this.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, entries.index(BOS))]
    )
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False) for token in recipe.special_tokens]
    )
    return json.loads(tokenizer.to_str())


def _tokenizer_config(recipe: TokenizerRecipe) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json, in the words other libraries read."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [CHAT_START, CHAT_END, *recipe.specials],
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for index, token in enumerate(recipe.special_tokens)
        },
        "chat_template": CHATML_TEMPLATE,
    }


def _check_free(out: Path) -> None:
    """Refuse to write where something is, before any work is done."""
    kind = path_kind(out)
    try:
        taken = kind != "missing" and (kind != "folder" or any(out.iterdir()))
    except OSError as error:
        raise InputError(f"cannot look into {str(out)!r}: {error.strerror or error}") from error
    if taken:
        raise InputError(f"{str(out)!r} exists: name a new folder, or remove it first")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` when the block ends well, and is gone when it does not."""
    draft = out.with_name(f".{out.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        draft.mkdir(parents=True)
        yield draft
        draft.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {str(out)!r}: {error.strerror or error}; "
            "check the folder, its permissions and the free space"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
