"""A checkpoint folder's tokenizer as the header of a GGUF file, token-exact for llama.cpp.

Two families have a counterpart there: byte-level BPE with one of the ways to cut that llama.cpp
knows, and SentencePiece's BPE, which is described by scores instead of merges. Anything else is
refused with the reason; what is only nearly the same is said in `GgufVocabulary.notes`.

Source: llama.cpp `src/llama-vocab.cpp`, `conversion/base.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jamba_lm.errors import TokenizerError
from jamba_lm.files import parse_json, path_kind
from jamba_lm.gguf_output import Typed
from jamba_lm.text.chat_template import template_sources
from jamba_lm.text.decoding import BYTE_TOKEN
from jamba_lm.text.pre_tokenizers import cut_of
from jamba_lm.text.special_tokens import SpecialTokens, read_special_tokens
from jamba_lm.text.tokenizer_file import FILE_LIMIT_BYTES, TokenizerFile, understand

# The numbers of llama.cpp's token types (llama.h).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
# A whole tokenizer.json, for programs that can use it. Source: the GGUF specification.
WHOLE_FILE = "tokenizer.huggingface.json"
STOP_NAMES = ("eos", "eot", "eom")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
PAD_SCORE = -1e6


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """A tokenizer, ready for a header.

    Attributes:
        values: keys and typed values.
        family: llama.cpp's name for its kind: "gpt2", "llama" or "none".
        notes: where llama.cpp will not do the same, a sentence each.
    """

    values: Mapping[str, Typed]
    family: str
    notes: tuple[str, ...] = ()


def no_vocabulary() -> GgufVocabulary:
    """Return what stands for no tokenizer at all: such a model takes ids only."""
    return GgufVocabulary({f"{PREFIX}model": ("string", "none")}, "none")


def read_vocabulary(folder: str | Path, vocab_size: int) -> GgufVocabulary:
    """Translate the tokenizer of a checkpoint folder.

    Args:
        folder: holds tokenizer.json and the files beside it.
        vocab_size: rows of the model, which may be more than there are tokens.

    Raises:
        TokenizerError: no tokenizer, a malformed one, or one that llama.cpp has no counterpart of.
    """
    path = Path(folder) / "tokenizer.json"
    if path_kind(path) != "file":
        raise TokenizerError(f"no tokenizer.json in {str(folder)!r}")
    with path.open("rb") as opened:
        data = opened.read(FILE_LIMIT_BYTES + 1)
    if len(data) > FILE_LIMIT_BYTES:
        raise TokenizerError(f"{str(path)!r} is longer than {FILE_LIMIT_BYTES:,} bytes")
    document = parse_json(data, f"tokenizer {str(path)!r}", TokenizerError)
    try:
        file = understand(document)
        special = read_special_tokens(Path(folder), file)
        sources = template_sources(Path(folder), special.settings)
        byte_level = file.decoding.byte_level
        family = _byte_level(document) if byte_level else _sentencepiece(document, file)
    except TokenizerError as error:
        raise TokenizerError(f"tokenizer in {str(folder)!r}: {error}") from error
    tokens, types = _tokens(file, vocab_size, byte_level=byte_level)
    values: dict[str, Typed] = {
        f"{PREFIX}tokens": ("string[]", tokens),
        f"{PREFIX}token_type": ("int32[]", types),
        WHOLE_FILE: ("string", data.decode("utf-8")),
        **family.values,
        **_special(special, file),
        **_templates(sources),
    }
    if f"{PREFIX}scores" in values:
        scores = values[f"{PREFIX}scores"][1]
        values[f"{PREFIX}scores"] = (
            "float32[]",
            [scores.get(name, PAD_SCORE) for name in tokens],
        )
    notes = (*family.notes, *_stripping(file), *_too_many_stops(special))
    return GgufVocabulary(values, family.family, notes)


def _byte_level(document: Mapping[str, Any]) -> GgufVocabulary:
    if document.get("normalizer") is not None:
        raise TokenizerError(
            f"its normalizer {_kind(document['normalizer'])} changes texts before they are cut, "
            "which llama.cpp does not do for byte-level tokenizers"
        )
    model = document["model"]
    cut = cut_of(document.get("pre_tokenizer"), whole_words=bool(model.get("ignore_merges")))
    notes = [f"llama.cpp makes other tokens of {cut.except_for}"] if cut.except_for else []
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return GgufVocabulary(
        {
            f"{PREFIX}model": ("string", "gpt2"),
            f"{PREFIX}pre": ("string", cut.name),
            f"{PREFIX}merges": ("string[]", merges),
        },
        "gpt2",
        tuple(notes),
    )


def _sentencepiece(document: Mapping[str, Any], file: TokenizerFile) -> GgufVocabulary:
    model = document["model"]
    if not model.get("byte_fallback"):
        raise TokenizerError(
            "it is neither byte-level nor does it spell unknown characters in bytes "
            "(byte_fallback): llama.cpp has no counterpart"
        )
    lacking = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
    if lacking:
        raise TokenizerError(f"it has no token {lacking[0]}, and llama.cpp needs all 256 bytes")
    dummy, notes = _spaces(document)
    return GgufVocabulary(
        {
            f"{PREFIX}model": ("string", "llama"),
            f"{PREFIX}pre": ("string", "default"),
            f"{PREFIX}add_space_prefix": ("bool", dummy),
            f"{PREFIX}scores": ("float32[]", merge_scores(model["vocab"], file, model["merges"])),
        },
        "llama",
        notes,
    )


def _spaces(document: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Tell whether a text gets a space in front; SentencePiece's spelling of spaces is a must."""
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepended = {"type": "Prepend", "prepend": SPACE}
    normalizer, cut = document.get("normalizer"), document.get("pre_tokenizer")
    parts: list[Any] = []
    if isinstance(normalizer, dict):
        parts = normalizer.get("normalizers", [normalizer])
    if cut is None and parts in ([prepended, replaced], [replaced]):
        return prepended in parts, ()
    match cut:
        case {"type": "Metaspace", "replacement": str(mark), "split": False, **more} if (
            mark == SPACE and not parts
        ):
            scheme = more.get("prepend_scheme", "always")
            if scheme == "never":
                return False, ()
            places = ["texts that begin with one"]
            if scheme == "first":
                places.append("what follows a control token")
            if scheme in ("always", "first"):
                return True, (f"llama.cpp puts a space in front of {' and '.join(places)}, too",)
    raise TokenizerError(
        f"normalizer {_kind(normalizer)} with pre_tokenizer {_kind(cut)} has no counterpart in "
        f"llama.cpp: a byte-fallback tokenizer there only writes spaces as {SPACE} and does not "
        "cut texts before merging"
    )


def _kind(part: Any) -> str:
    if not isinstance(part, dict):
        return "none"
    inner = part.get("normalizers", part.get("pretokenizers"))
    if isinstance(inner, list):
        return " > ".join(_kind(one) for one in inner)
    return str(part.get("type"))


def merge_scores(
    vocab: Mapping[str, int], file: TokenizerFile, merges: Sequence[Any]
) -> dict[str, float]:
    """Turn merges into scores with which SentencePiece's algorithm merges alike.

    That algorithm joins the two neighbours whose union is the token of the highest score, whatever
    the two are; BPE joins the pair that comes first in its list. They agree when the list holds
    every way to split each token into two, and all ways of one token before those of the next:
    that is how the list of a converted SentencePiece model is made.

    Raises:
        TokenizerError: the list is not of that kind.
    """
    pairs = [tuple(one.split(" ") if isinstance(one, str) else one) for one in merges]
    ranks: dict[str, int] = {}
    before = ""
    for left, right in pairs:
        made = left + right
        if made != before and made in ranks:
            raise TokenizerError(
                f"its merges make {made!r:.80} in two places of the list, so that no score of "
                "this token says the same: it was not made from a SentencePiece model"
            )
        ranks.setdefault(made, len(ranks))
        before = made
    known = set(pairs)
    for name in vocab:
        if name in file.added or BYTE_TOKEN.fullmatch(name):
            continue
        for place in range(1, len(name)):
            pair = (name[:place], name[place:])
            if pair not in known and pair[0] in vocab and pair[1] in vocab:
                raise TokenizerError(
                    f"its merges cannot make {name!r:.80} of {pair[0]!r:.80} and {pair[1]!r:.80}, "
                    "but llama.cpp would: it was not made from a SentencePiece model"
                )
    # Single characters are never the result of a merge: SentencePiece puts them behind.
    last = float(len(ranks))
    return {name: -float(ranks.get(name, last)) for name in vocab}


def _tokens(
    file: TokenizerFile, vocab_size: int, *, byte_level: bool
) -> tuple[list[str], list[int]]:
    names = {index: name for name, index in file.names.items()}
    if max(names) >= vocab_size:
        raise TokenizerError(
            f"the tokenizer has the id {max(names)}, but the model has {vocab_size} rows: "
            "do they belong together?"
        )
    tokens, types = [], []
    for index in range(vocab_size):
        name = names.get(index)
        added = None if name is None else file.added.get(name)
        if name is None:
            name, kind = f"[PAD{index}]", UNUSED
            if name in file.names:
                raise TokenizerError(f"a token is called {name}, which stands for an unused row")
        elif index == file.unknown_id:
            kind = UNKNOWN
        elif added is not None:
            kind = CONTROL if added.special else USER_DEFINED
        elif not byte_level and BYTE_TOKEN.fullmatch(name):
            kind = BYTE
        else:
            kind = NORMAL
        tokens.append(name)
        types.append(kind)
    return tokens, types


def _special(special: SpecialTokens, file: TokenizerFile) -> dict[str, Typed]:
    ids: dict[str, int | None] = {
        "bos": special.bos_id,
        "padding": special.pad_id,
        "unknown": file.unknown_id,
        **dict(zip(STOP_NAMES, stop_ids(special, file), strict=False)),
    }
    return {
        **{
            f"{PREFIX}{name}_token_id": ("uint32", one)
            for name, one in ids.items()
            if one is not None
        },
        f"{PREFIX}add_bos_token": ("bool", special.add_bos),
        f"{PREFIX}add_eos_token": ("bool", False),
    }


def stop_ids(special: SpecialTokens, file: TokenizerFile) -> list[int]:
    """Return the ids that end a text, the one that tokenizer_config.json calls EOS first."""
    first = file.names.get(special.names.get("eos_token", ""))
    return sorted(special.eos_ids, key=lambda one: (one != first, one))


def _templates(sources: Mapping[str, str]) -> dict[str, Typed]:
    values: dict[str, Typed] = {}
    others = [name for name in sources if name != "default"]
    if "default" in sources:
        values[TEMPLATE] = ("string", sources["default"])
    if others:
        values["tokenizer.chat_templates"] = ("string[]", others)
        values |= {f"{TEMPLATE}.{name}": ("string", sources[name]) for name in others}
    return values


def _stripping(file: TokenizerFile) -> list[str]:
    odd = [one for one in file.added.values() if one.lstrip or one.rstrip or one.single_word]
    if not odd:
        return []
    return [
        f"llama.cpp takes no notice of lstrip, rstrip and single_word, which {len(odd)} added "
        f"tokens have ({odd[0].content:.40})"
    ]


def _too_many_stops(special: SpecialTokens) -> list[str]:
    left_out = len(special.eos_ids) - len(STOP_NAMES)
    if left_out <= 0:
        return []
    return [f"llama.cpp stops at {len(STOP_NAMES)} tokens at most; {left_out} are left out"]
