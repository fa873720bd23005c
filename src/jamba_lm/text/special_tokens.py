"""Finds out which tokens start and end a text, from the files that lie beside tokenizer.json.

Three files may say it (tokenizer_config.json, generation_config.json, config.json), and in
published folders they do not always agree; a disagreement is reported, not hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jamba_lm.errors import TokenizerError
from jamba_lm.files import path_kind, read_json
from jamba_lm.text.tokenizer_file import ID_LIMIT, TokenizerFile

SETTINGS, GENERATION, MODEL = "tokenizer_config.json", "generation_config.json", "config.json"
# What the published Jamba tokenizers call them; used when no file says anything.
JAMBA_NAMES = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|pad|>"}

# Which file says which ids, the most trusted one first.
Claims = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What the files beside a tokenizer.json say.

    Attributes:
        bos_id: what Jamba wants in front of every text; None when there is no such token.
        eos_ids: every token that ends a text or a turn, in ascending order.
        pad_id: the filler token, or None.
        add_bos: whether a text gets the BOS when the caller does not say.
        names: bos_token, eos_token, pad_token, unk_token: what chat templates write.
        settings: the whole of tokenizer_config.json.
        contradictions: one sentence for each disagreement, and what was made of it.
    """

    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    add_bos: bool
    names: Mapping[str, str]
    settings: Mapping[str, Any]
    contradictions: tuple[str, ...]


def read_special_tokens(folder: Path, file: TokenizerFile) -> SpecialTokens:
    """Read the three files in `folder`, as far as they exist, against the vocabulary of `file`.

    Raises:
        TokenizerError: a file is malformed, or names a token that the vocabulary lacks.
    """
    return find_special_tokens(
        {
            name: {}
            if path_kind(folder / name) == "missing"
            else read_json(folder / name, what, TokenizerError)
            for name, what in (
                (SETTINGS, "tokenizer settings"),
                (GENERATION, "generation settings"),
                (MODEL, "model configuration"),
            )
        },
        file,
    )


def find_special_tokens(
    files: Mapping[str, Mapping[str, Any]], file: TokenizerFile
) -> SpecialTokens:
    """Find them in the contents of the three files, by file name; {} for one that is not there.

    Raises:
        TokenizerError: a file is malformed, or names a token that the vocabulary lacks.
    """
    settings = files[SETTINGS]
    names = {
        key: name
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (name := _token_name(settings, key, file)) is not None
    }
    notes: list[str] = []
    bos_id = _one("bos", _claims("bos", names, files, file), notes)
    pad_id = _one("pad", _claims("pad", names, files, file), notes)
    eos_ids = _all("eos", _claims("eos", names, files, file), notes)

    names_by_id = {index: name for name, index in file.names.items()}
    if bos_id in names_by_id:
        names.setdefault("bos_token", names_by_id[bos_id])
    if eos_ids and eos_ids[0] in names_by_id:
        names.setdefault("eos_token", names_by_id[eos_ids[0]])
    for role, ids in (("bos", [] if bos_id is None else [bos_id]), ("eos", eos_ids)):
        notes += [
            f"{role}_token_id {one} is no token of tokenizer.json"
            for one in ids
            if one not in names_by_id
        ]
    _check_vocabulary(file, files, notes)

    add_bos = bos_id is not None
    if settings.get("add_bos_token") is False and add_bos:
        add_bos = False
        notes.append(
            f"{SETTINGS} says add_bos_token false, though Jamba wants a BOS in front of every "
            "text; none is put there unless asked for"
        )
    return SpecialTokens(
        bos_id=bos_id,
        eos_ids=eos_ids,
        pad_id=pad_id,
        add_bos=add_bos,
        names=names,
        settings=settings,
        contradictions=tuple(notes),
    )


def _token_name(settings: Mapping[str, Any], key: str, file: TokenizerFile) -> str | None:
    value = settings.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    if name is None:
        return None
    if not isinstance(name, str) or name not in file.names:
        raise TokenizerError(
            f"{SETTINGS}: {key} is {value!r:.80}, which is no token of tokenizer.json"
        )
    return name


def _claims(
    role: str,
    names: Mapping[str, str],
    files: Mapping[str, Mapping[str, Any]],
    file: TokenizerFile,
) -> Claims:
    """List what each file says about one role; a lone tokenizer.json is known by Jamba's names."""
    claims: Claims = []
    if f"{role}_token" in names:
        claims.append((SETTINGS, (file.names[names[f"{role}_token"]],)))
    if role == "bos" and file.template_bos in file.names:
        claims.append(("tokenizer.json", (file.names[str(file.template_bos)],)))
    for where in (GENERATION, MODEL):
        value = files[where].get(f"{role}_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for one in ids:
            if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < ID_LIMIT:
                raise TokenizerError(
                    f"{where}: {role}_token_id is {value!r:.80}, expected a token id or a list of "
                    "them"
                )
        if ids:
            claims.append((where, tuple(ids)))
    if not claims and JAMBA_NAMES[role] in file.names:
        claims.append(("tokenizer.json", (file.names[JAMBA_NAMES[role]],)))
    return claims


def _one(role: str, claims: Claims, notes: list[str]) -> int | None:
    """Return the id that the most trusted file gives."""
    if not claims:
        return None
    chosen = claims[0][1][0]
    notes += [
        f"{where} says {role}_token_id {ids[0]}, {claims[0][0]} says {chosen}; {chosen} is used"
        for where, ids in claims[1:]
        if chosen not in ids
    ]
    return chosen


def _all(role: str, claims: Claims, notes: list[str]) -> tuple[int, ...]:
    """Return the ids that any file gives."""
    for where, ids in claims[1:]:
        first_where, first_ids = claims[0]
        if not set(first_ids) & set(ids):
            notes.append(
                f"{where} says {role}_token_id {ids}, {first_where} says {first_ids}; all are used"
            )
    return tuple(sorted({one for _, ids in claims for one in ids}))


def _check_vocabulary(
    file: TokenizerFile, files: Mapping[str, Mapping[str, Any]], notes: list[str]
) -> None:
    """Report ids that the two other files give to other tokens than tokenizer.json does."""
    listed = files[SETTINGS].get("added_tokens_decoder")
    for key, fields in listed.items() if isinstance(listed, dict) else ():
        name = fields.get("content") if isinstance(fields, dict) else None
        here = file.names.get(name) if isinstance(name, str) else None
        if str(here) != key:
            notes.append(
                f"{SETTINGS} gives {name!r:.80} the id {key:.20}, tokenizer.json gives it "
                f"{'none' if here is None else here}; tokenizer.json is followed"
            )
    rows = files[MODEL].get("vocab_size")
    highest = max(file.bytes_by_id)
    if isinstance(rows, int) and highest >= rows:
        notes.append(
            f"{MODEL} says vocab_size {rows}, but tokenizer.json has the id {highest}: the model "
            "cannot read every token"
        )
