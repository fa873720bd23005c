"""Reads tokenizer.json with suspicion, and says what bytes each token stands for.

Only what a byte-complete or SentencePiece-like BPE needs is accepted; the rest is refused by name
rather than half understood. Knows nothing about BOS, chats or models.

Two things are taken out of the library's hands. Added tokens are not given to it, because it would
then find control tokens in any text; and its decoder is replaced by the bytes of each token,
because only bytes can be streamed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from jamba_lm.errors import TokenizerError
from jamba_lm.files import MIB, read_json
from jamba_lm.text.decoding import BYTE_TOKEN, Decoding, read_decoding

FILE_LIMIT_BYTES = 32 * MIB
# Far above any vocabulary (the largest published ones are near 2**18).
ID_LIMIT = 2**24
TOKEN_LIMIT_CHARACTERS = 4096
# A chain of replacements could otherwise turn one character into gigabytes.
GROWTH_LIMIT = 64
SEQUENCE_DEPTH_LIMIT = 4

# What the library raises when it refuses: bare Exception, and what Python makes of its arguments.
LIBRARY_REFUSALS = (Exception, TypeError, ValueError, OverflowError, RecursionError)

# <think>, </tool_call>, <|im_end|>, [INST]: what a chat template writes and a text must not.
MARKER = re.compile(r"<[^\s<>]+>|\[[A-Z_/]+\]")

NORMALIZERS = (
    *("Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Sequence", "Strip"),
    "StripAccents",
)
PRE_TOKENIZERS = (
    *("ByteLevel", "Digits", "Metaspace", "Punctuation", "Sequence", "Split", "Whitespace"),
    "WhitespaceSplit",
)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in a text before anything else is done to it.

    Attributes:
        id: its id.
        content: its name, which is also its text.
        special: whether decoding leaves it out by default.
        control: whether it steers the model, so that a text that is not trusted must not make it.
        lstrip: whether it swallows the white space in front of it.
        rstrip: whether it swallows the white space behind it.
        single_word: whether it is found only where no letter or digit touches it.
    """

    id: int
    content: str
    special: bool
    control: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """The contents of one tokenizer.json.

    Attributes:
        start: tokenizes a piece of text at the start of a text.
        inside: tokenizes a piece that follows another; differs in the dummy space only.
        names: token name -> id.
        bytes_by_id: what each token writes.
        added: the added tokens by content.
        unknown_id: the token for what the vocabulary cannot spell, or None.
        template_bos: the token that the file's own post-processor puts first, or None.
        decoding: what happens to the whole text.
    """

    start: tokenizers.Tokenizer
    inside: tokenizers.Tokenizer
    names: Mapping[str, int]
    bytes_by_id: Mapping[int, bytes]
    added: Mapping[str, AddedToken]
    unknown_id: int | None
    template_bos: str | None
    decoding: Decoding


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises into one line.

    Raises:
        TokenizerError: the library refused or panicked while it did `what`.
    """
    try:
        yield
    except BaseException as error:
        # The library raises bare Exception, and a Rust panic is a BaseException without a home.
        panicked = type(error).__name__ == "PanicException"
        if not panicked and type(error) not in LIBRARY_REFUSALS:
            raise
        reason = " ".join(str(error).split())[:300]
        raise TokenizerError(f"the tokenizers library cannot {what}: {reason}") from error


def read_tokenizer_file(path: Path) -> TokenizerFile:
    """Read and check a tokenizer.json.

    Raises:
        TokenizerError: the file is missing, malformed, contradicts itself or uses what is not
            supported; the message names the field.
    """
    document = read_json(path, "tokenizer", TokenizerError, FILE_LIMIT_BYTES)
    try:
        return understand(document)
    except TokenizerError as error:
        raise TokenizerError(f"tokenizer {str(path)!r}: {error}") from error


def understand(document: dict[str, Any]) -> TokenizerFile:
    """Check the content of a tokenizer.json.

    Raises:
        TokenizerError: as for `read_tokenizer_file`.
    """
    model = _object(document.get("model"), "model")
    names = _vocabulary(model)
    added = _added_tokens(document.get("added_tokens"), names, bool(model.get("byte_fallback")))
    decoding = read_decoding(document.get("decoder"))

    bytes_by_id = {index: decoding.spell(name) for name, index in names.items()}
    bytes_by_id |= {token.id: token.content.encode() for token in added.values()}
    names = names | {token.content: token.id for token in added.values()}

    normalizer, splitter = document.get("normalizer"), document.get("pre_tokenizer")
    _check_growth(_parts(normalizer, "normalizer", "normalizers", NORMALIZERS))
    splitters = _parts(splitter, "pre_tokenizer", "pretokenizers", PRE_TOKENIZERS)
    bpe = _bpe(model)
    start = _assemble(bpe, normalizer, splitter)
    inside = start
    if any(part.get("prepend_scheme") == "first" for part in splitters):
        never = [
            part | {"prepend_scheme": "never"} if part["type"] == "Metaspace" else part
            for part in splitters
        ]
        inside = _assemble(bpe, normalizer, {"type": "Sequence", "pretokenizers": never})

    unknown = model.get("unk_token")
    return TokenizerFile(
        start=start,
        inside=inside,
        names=names,
        bytes_by_id=bytes_by_id,
        added=added,
        unknown_id=None if unknown is None else names[unknown],
        template_bos=_template_bos(document.get("post_processor")),
        decoding=decoding,
    )


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TokenizerError(f"{where} is {_shown(value)}, expected an object")
    return value


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:80]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > TOKEN_LIMIT_CHARACTERS:
        raise TokenizerError(
            f"{where} is {_shown(value)}, expected a text of at most "
            f"{TOKEN_LIMIT_CHARACTERS:,} characters"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{where} is {value!r:.80}, which holds half a surrogate pair"
        ) from error
    return value


def _identity(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < ID_LIMIT:
        raise TokenizerError(
            f"{where} is {_shown(value)}, expected an id from 0 to {ID_LIMIT - 1:,}"
        )
    return value


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise TokenizerError(f"model.type is {_shown(kind)}, but only 'BPE' is supported")
    vocab = _object(model.get("vocab"), "model.vocab")
    if not vocab:
        raise TokenizerError("model.vocab is empty")
    taken: dict[int, str] = {}
    for name, index in vocab.items():
        _text(name, "a name in model.vocab")
        other = taken.setdefault(_identity(index, f"the id of {name!r:.80} in model.vocab"), name)
        if other != name:
            raise TokenizerError(f"model.vocab gives the id {index} to both {other!r} and {name!r}")
    return vocab


def _bpe(model: dict[str, Any]) -> models.BPE:
    """Build the library's model from fields that are known not to make it panic."""
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            raise TokenizerError(
                f"model.{field} is {_shown(model[field])}, but it is not supported: expected null"
            )
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise TokenizerError(f"model.merges is {_shown(merges)}, expected a list")
    vocab, pairs = model["vocab"], []
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            raise TokenizerError(f"model.merges[{number}] is {_shown(merge)}, expected two tokens")
        left, right = pair
        if not (isinstance(left, str) and isinstance(right, str)):
            raise TokenizerError(f"model.merges[{number}] is {_shown(merge)}, expected two texts")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(
                f"model.merges[{number}] joins {left!r:.80} and {right!r:.80}, but one of them or "
                "what they make is not in model.vocab"
            )
        pairs.append((left, right))
    unknown = model.get("unk_token")
    if unknown is not None and not (isinstance(unknown, str) and unknown in vocab):
        raise TokenizerError(f"model.unk_token is {_shown(unknown)}, which is not in model.vocab")
    with library_errors("build the model"):
        return models.BPE(
            vocab=vocab,
            merges=pairs,
            unk_token=unknown,
            **{
                field: _flag(model, field)
                for field in ("fuse_unk", "byte_fallback", "ignore_merges")
            },
        )


def _flag(values: Mapping[str, Any], field: str) -> bool:
    value = values.get(field, False)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise TokenizerError(f"{field} is {_shown(value)}, expected true or false")
    return value


def _added_tokens(
    value: Any, vocab: Mapping[str, int], byte_fallback: bool
) -> dict[str, AddedToken]:
    if value is None:
        value = []
    if not isinstance(value, list):
        raise TokenizerError(f"added_tokens is {_shown(value)}, expected a list")
    by_id = {index: name for name, index in vocab.items()}
    added: dict[str, AddedToken] = {}
    for number, entry in enumerate(value):
        where = f"added_tokens[{number}]"
        fields = _object(entry, where)
        content = _text(fields.get("content"), f"{where}.content")
        index = _identity(fields.get("id"), f"{where}.id")
        if not content:
            raise TokenizerError(f"{where}.content is empty")
        if by_id.setdefault(index, content) != content or vocab.get(content, index) != index:
            raise TokenizerError(
                f"{where} gives {content!r:.80} the id {index}, which contradicts model.vocab or "
                "an added token before it"
            )
        if content in added:
            raise TokenizerError(f"{where}: {content!r:.80} is added twice")
        if byte_fallback and BYTE_TOKEN.fullmatch(content):
            # A spelling of a byte, which is for the model to use and not to be found in a text.
            continue
        special = _flag(fields, "special")
        added[content] = AddedToken(
            id=index,
            content=content,
            special=special,
            control=len(content) > 1 and (special or MARKER.fullmatch(content) is not None),
            lstrip=_flag(fields, "lstrip"),
            rstrip=_flag(fields, "rstrip"),
            single_word=_flag(fields, "single_word"),
        )
    return added


def _parts(
    value: Any, where: str, members: str, allowed: tuple[str, ...], depth: int = 0
) -> list[dict[str, Any]]:
    """List the parts of a normalizer or pre-tokenizer, sequences within sequences unrolled."""
    if value is None:
        return []
    fields = _object(value, where)
    kind = fields.get("type")
    if kind not in allowed:
        raise TokenizerError(
            f"{where}.type is {_shown(kind)}, which is not supported: expected {', '.join(allowed)}"
        )
    if kind != "Sequence":
        return [fields]
    inner = fields.get(members)
    if not isinstance(inner, list) or depth == SEQUENCE_DEPTH_LIMIT:
        raise TokenizerError(
            f"{where}.{members} is {_shown(inner)}, expected a list, nested at most "
            f"{SEQUENCE_DEPTH_LIMIT} deep"
        )
    return [part for one in inner for part in _parts(one, where, members, allowed, depth + 1)]


def _check_growth(normalizers: list[dict[str, Any]]) -> None:
    """Refuse normalizers that would make a text much longer."""
    growth = 1.0
    for part in normalizers:
        if part["type"] == "Prepend":
            _text(part.get("prepend"), "normalizer.prepend")
        if part["type"] == "Replace":
            content = _text(part.get("content"), "normalizer.content")
            pattern = part.get("pattern")
            old = pattern.get("String") if isinstance(pattern, dict) else None
            if isinstance(old, str) and old:
                growth *= max(1, len(content) / len(old))
            else:
                # A regular expression may match nothing at all, between any two characters.
                growth *= 1 + len(content)
    if growth > GROWTH_LIMIT:
        raise TokenizerError(
            f"the normalizer can make a text {growth:,.0f} times as long; at most {GROWTH_LIMIT} "
            "times is supported"
        )


def _assemble(
    bpe: models.BPE, normalizer: dict[str, Any] | None, splitter: dict[str, Any] | None
) -> tokenizers.Tokenizer:
    """Put a tokenizer together that knows neither added tokens nor lengths to cut or pad to."""
    frame: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": splitter,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    with library_errors("understand the normalizer or the pre_tokenizer"):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(frame))
        tokenizer.model = bpe
    return tokenizer


def _template_bos(post_processor: Any) -> str | None:
    """Return the special token that a TemplateProcessing puts in front of a text."""
    if not isinstance(post_processor, dict):
        return None
    parts = post_processor.get("processors", [post_processor])
    for part in parts if isinstance(parts, list) else []:
        match part:
            case {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": str(name)}}, *_],
            }:
                return name
    return None
