"""The tokenizer of a GGUF file, as the contents of a checkpoint folder's tokenizer files.

What llama.cpp reads is translated: tokens with merges (kind "gpt2"), or with scores (kind
"llama"). A file that carries its whole tokenizer.json, as ours do, gives that.

Source: llama.cpp `src/llama-vocab.cpp`; for the merges of a SentencePiece model, transformers
`convert_slow_tokenizer.py` (`generate_merges`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jamba_lm.errors import TokenizerError
from jamba_lm.files import parse_json
from jamba_lm.gguf_file import GgufFile
from jamba_lm.gguf_parts import open_gguf
from jamba_lm.text.decoding import BYTE_TOKEN
from jamba_lm.text.gguf_vocabulary import (
    CONTROL,
    PREFIX,
    SPACE,
    STOP_NAMES,
    TEMPLATE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_FILE,
)
from jamba_lm.text.pre_tokenizers import as_pre_tokenizer, named_cut
from jamba_lm.text.tokenizer_file import ID_LIMIT, TOKEN_LIMIT_CHARACTERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizerDocuments:
    """What the tokenizer files of a folder would hold.

    Attributes:
        tokenizer: tokenizer.json.
        settings: tokenizer_config.json, chat templates apart.
        generation: the ids of generation_config.json.
        templates: chat templates by name.
    """

    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    generation: dict[str, Any]
    templates: dict[str, str]


def read_documents(file: GgufFile) -> TokenizerDocuments:
    """Translate the tokenizer of an open GGUF file.

    Raises:
        TokenizerError: it has none, a malformed one, or one of a kind that is not supported.
        CheckpointError: its texts are not UTF-8.
    """
    try:
        tokens = _Tokens(file)
        if file.get(WHOLE_FILE) is not None:
            document = _whole_document(file, tokens)
        elif tokens.model == "gpt2":
            document = _byte_level(file, tokens)
        else:
            document = _sentencepiece(file, tokens)
        return TokenizerDocuments(
            document, _settings(file, tokens), _generation(file, tokens), _templates(file)
        )
    except TokenizerError as error:
        raise TokenizerError(f"tokenizer in {str(file.path)!r}: {error}") from error


def has_tokenizer(file: GgufFile) -> bool:
    """Tell whether a file says anything of a tokenizer."""
    return file.get(f"{PREFIX}model") not in (None, "none", "no_vocab")


class _Tokens:
    """The list of tokens with their types, checked.

    Attributes:
        model: llama.cpp's name for the kind.
        names: every token, by id.
        types: its type, by id.
        vocab: token -> id, unused rows left out.
    """

    def __init__(self, file: GgufFile) -> None:
        if not has_tokenizer(file):
            raise TokenizerError("it says nothing of a tokenizer; give the one of the model apart")
        self.model: str = _typed(file, "model", "string")
        if self.model not in ("gpt2", "llama"):
            raise TokenizerError(
                f"tokenizer.ggml.model is {self.model!r:.60}; only 'gpt2' and 'llama' are supported"
            )
        self.names: list[str] = _typed(file, "tokens", "string[]")
        self.types: list[int] = [1] * len(self.names)
        if file.type_of(f"{PREFIX}token_type") is not None:
            self.types = _typed(file, "token_type", "int32[]")
        if len(self.types) != len(self.names) or not self.names:
            raise TokenizerError(f"{len(self.names)} tokens, but {len(self.types)} types of them")
        self.vocab: dict[str, int] = {}
        for index, (name, kind) in enumerate(zip(self.names, self.types, strict=True)):
            if kind == UNUSED and name == f"[PAD{index}]":
                continue
            if self.vocab.setdefault(name, index) != index:
                raise TokenizerError(
                    f"the token {name!r:.80} is listed twice, as {self.vocab[name]} and {index}"
                )

    def name(self, index: int, role: str) -> str:
        if not 0 <= index < len(self.names):
            raise TokenizerError(f"{role} is token {index}, but there are {len(self.names)}")
        return self.names[index]

    def added(self) -> list[dict[str, Any]]:
        """List what a tokenizer.json calls added tokens."""
        return [
            {
                "id": index,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": self.types[index] in (CONTROL, UNKNOWN),
            }
            for name, index in self.vocab.items()
            if self.types[index] in (CONTROL, UNKNOWN, USER_DEFINED)
        ]

    def unknown(self) -> str | None:
        found = [name for name, index in self.vocab.items() if self.types[index] == UNKNOWN]
        return found[0] if found else None


def _typed(file: GgufFile, name: str, kind: str) -> Any:
    key = PREFIX + name
    if file.type_of(key) != kind or (file.length(key) or 0) > ID_LIMIT:
        raise TokenizerError(f"{key} is {file.type_of(key) or 'missing'}, expected {kind}")
    return file.get(key)


def _whole_document(file: GgufFile, tokens: _Tokens) -> dict[str, Any]:
    if file.type_of(WHOLE_FILE) != "string":
        raise TokenizerError(f"{WHOLE_FILE} is {file.type_of(WHOLE_FILE)}, expected string")
    document = parse_json(file.get(WHOLE_FILE).encode("utf-8"), WHOLE_FILE, TokenizerError)
    model, added = document.get("model"), document.get("added_tokens")
    named: dict[Any, Any] = dict(model.get("vocab") or {}) if isinstance(model, dict) else {}
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            named[token["content"]] = token.get("id")
    for name in {**named, **tokens.vocab}:
        if named.get(name) != tokens.vocab.get(name):
            raise TokenizerError(
                f"{WHOLE_FILE} gives {name!r:.80} the id {named.get(name)!r:.20}, but "
                f"{PREFIX}tokens gives it {tokens.vocab.get(name)}: one of them was changed"
            )
    return document


def _byte_level(file: GgufFile, tokens: _Tokens) -> dict[str, Any]:
    cut = named_cut(_typed(file, "pre", "string"))
    merges = []
    for merge in _typed(file, "merges", "string[]"):
        # The first space is part of the first token when it is its first character.
        space = merge.find(" ", 1)
        if space < 0:
            raise TokenizerError(f"the merge {merge!r:.80} does not hold two tokens")
        merges.append([merge[:space], merge[space + 1 :]])
    return _document(
        tokens,
        normalizer=None,
        pre_tokenizer=as_pre_tokenizer(cut),
        decoder={
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        model={"merges": merges, "ignore_merges": cut.whole_words},
    )


def _sentencepiece(file: GgufFile, tokens: _Tokens) -> dict[str, Any]:
    # The default of llama.cpp for this kind.
    dummy = True
    if file.type_of(f"{PREFIX}add_space_prefix") is not None:
        dummy = _typed(file, "add_space_prefix", "bool")
    if file.get(f"{PREFIX}remove_extra_whitespaces"):
        raise TokenizerError("it takes extra white space out of texts, which is not supported")
    normalizers: list[dict[str, Any]] = []
    if dummy:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if dummy:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _document(
        tokens,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            "merges": _merges(file, tokens),
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": tokens.unknown(),
        },
    )


def _merges(file: GgufFile, tokens: _Tokens) -> list[list[str]]:
    """List every split of every token into two others, the best score first."""
    scores: list[float] = _typed(file, "scores", "float32[]")
    if len(scores) != len(tokens.names):
        raise TokenizerError(f"{len(tokens.names)} tokens, but {len(scores)} scores of them")
    normal = {
        name: index
        for name, index in tokens.vocab.items()
        if tokens.types[index] not in (CONTROL, UNKNOWN, USER_DEFINED)
        and not BYTE_TOKEN.fullmatch(name)
    }
    if len({scores[index] for index in normal.values()}) == 1:
        # What llama.cpp's converter writes of a folder without tokenizer.model. Ids of a
        # SentencePiece model follow the order of its merges.
        logger.warning("%s has no scores of tokens: the order of ids is taken instead", file.path)
        scores = [-float(index) for index in range(len(tokens.names))]
    merges: list[tuple[float, int, str, str]] = []
    for name, index in normal.items():
        if len(name) > TOKEN_LIMIT_CHARACTERS:
            raise TokenizerError(f"the token {name[:40]!r}... has {len(name):,} characters")
        merges += [
            (-scores[index], index, name[:place], name[place:])
            for place in range(1, len(name))
            if name[:place] in normal and name[place:] in normal
        ]
    merges.sort(key=lambda one: (one[0], one[1], len(one[2])))
    return [[left, right] for _, _, left, right in merges]


def _document(
    tokens: _Tokens, *, model: Mapping[str, Any], pre_tokenizer: Any, **parts: Any
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens.added(),
        "normalizer": parts["normalizer"],
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": parts["decoder"],
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": tokens.vocab,
            **model,
        },
    }


def _id(file: GgufFile, role: str, tokens: _Tokens) -> int | None:
    key = f"{PREFIX}{role}_token_id"
    if file.type_of(key) not in (None, "uint32", "int32", "uint64", "int64"):
        raise TokenizerError(f"{key} is {file.type_of(key)}, expected a token id")
    index: int | None = file.get(key)
    if index is not None:
        tokens.name(index, key)
    return index


def _settings(file: GgufFile, tokens: _Tokens) -> dict[str, Any]:
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {role: _id(file, word, tokens) for role, word in roles.items()}
    names = {
        f"{role}_token": None if index is None else tokens.names[index]
        for role, index in ids.items()
    }
    # llama.cpp's defaults: a SentencePiece model gets its BOS, a byte-level one does not.
    add_bos = file.get(f"{PREFIX}add_bos_token")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": tokens.model == "llama" if add_bos is None else bool(add_bos),
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }


def _generation(file: GgufFile, tokens: _Tokens) -> dict[str, Any]:
    stops = [_id(file, role, tokens) for role in STOP_NAMES]
    found = {"eos_token_id": [one for one in stops if one is not None]}
    return {key: value for key, value in found.items() if value}


def _templates(file: GgufFile) -> dict[str, str]:
    keys = {"default": TEMPLATE}
    if file.type_of("tokenizer.chat_templates") == "string[]":
        keys |= {name: f"{TEMPLATE}.{name}" for name in file.get("tokenizer.chat_templates")}
    found: dict[str, str] = {}
    for name, key in keys.items():
        kind = file.type_of(key)
        if kind is None and name == "default":
            continue
        if kind != "string":
            raise TokenizerError(f"{key} is {kind or 'missing'}, expected a text")
        found[name] = file.get(key)
    return found


def folder_files(documents: TokenizerDocuments) -> dict[str, dict[str, Any]]:
    """Return the JSON files that say all this in a checkpoint folder, by name."""
    templates: dict[str, Any] = {}
    if list(documents.templates) == ["default"]:
        templates["chat_template"] = documents.templates["default"]
    elif documents.templates:
        templates["chat_template"] = [
            {"name": name, "template": source} for name, source in documents.templates.items()
        ]
    return {
        "tokenizer.json": documents.tokenizer,
        "tokenizer_config.json": documents.settings | templates,
    }


def open_documents(path: str | Path) -> TokenizerDocuments:
    """Read the tokenizer of a GGUF file.

    Raises:
        CheckpointError: not a sound GGUF file.
        TokenizerError: as for `read_documents`.
    """
    return read_documents(open_gguf(path))
