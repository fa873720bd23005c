"""How byte-level tokenizers cut a text before merging: llama.cpp's names for it, and back.

A GGUF file names the way to cut, and llama.cpp has the patterns; a tokenizer.json spells it out.

Source: llama.cpp `src/llama-vocab.cpp` (`llm_tokenizer_bpe`), where each pattern stands beside the
one of the tokenizer.json that it was made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jamba_lm.errors import TokenizerError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_MARKS = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
# What `text/tokenizer_training.py` cuts by.
_OURS = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}|" + _REST_MARKS


@dataclass(frozen=True, slots=True)
class Cut:
    """One way to cut.

    Attributes:
        name: llama.cpp's name for it.
        pattern: the regular expression of a tokenizer.json; None for GPT-2's own, which needs
            none to be given.
        digits: every digit is cut out first.
        whole_words: a piece that is a token is taken before any merge (`ignore_merges`).
        except_for: the texts that llama.cpp cuts otherwise, or "" when there are none.
    """

    name: str
    pattern: str | None
    digits: bool = False
    whole_words: bool = False
    except_for: str = ""


CUTS = (
    Cut("gpt-2", None),
    Cut("starcoder", None, digits=True),
    Cut(
        "llama-bpe",
        _CONTRACTIONS + _WORD + r"\p{N}{1,3}|" + _REST,
        whole_words=True,
    ),
    Cut("qwen2", _CONTRACTIONS + _WORD + r"\p{N}|" + _REST),
    Cut(
        "qwen35",
        _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|" + _REST_MARKS,
    ),
    Cut("ufakzeka", _WORD + r"\p{N}|" + _REST),
    # Its nearest relative, last, so that reading the name gives the pattern above.
    Cut(
        "ufakzeka",
        _OURS,
        except_for="texts with combining marks (accents written as characters of their own)",
    ),
)

# Other names under which llama.cpp has the same patterns.
ALIASES: Mapping[str, str] = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "falcon-h1": "llama-bpe",
    "pixtral": "llama-bpe",
    "lfm2": "llama-bpe",
    "phi-2": "gpt-2",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "jais": "gpt-2",
    "refact": "starcoder",
    "command-r": "starcoder",
    "smollm": "starcoder",
    "codeshell": "starcoder",
    "exaone": "starcoder",
    "minerva-7b": "starcoder",
    "deepseek-r1-qwen": "qwen2",
    "stablelm2": "qwen2",
    "grok-2": "qwen2",
}


def cut_of(pre_tokenizer: Any, *, whole_words: bool) -> Cut:
    """Find llama.cpp's name for the `pre_tokenizer` of a byte-level tokenizer.json.

    Raises:
        TokenizerError: llama.cpp has no such way to cut.
    """
    for cut in CUTS:
        if _simple(as_pre_tokenizer(cut)) == _simple(pre_tokenizer):
            if cut.whole_words != whole_words:
                raise TokenizerError(
                    f"ignore_merges is {str(whole_words).lower()}, but with this pre_tokenizer "
                    f"({cut.name}) llama.cpp always takes it to be "
                    f"{str(cut.whole_words).lower()}"
                )
            return cut
    raise TokenizerError(
        "llama.cpp cannot cut a text as this tokenizer's pre_tokenizer does; it can as those of "
        f"{', '.join(dict.fromkeys(cut.name for cut in CUTS))} do"
    )


def named_cut(name: str) -> Cut:
    """Return the way to cut that llama.cpp calls `name`.

    Raises:
        TokenizerError: it is not known here.
    """
    known = {cut.name: cut for cut in reversed(CUTS)}
    found = known.get(ALIASES.get(name, name))
    if found is None:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r:.80}, a way to cut text that is not known here: "
            f"expected one of {', '.join(sorted([*known, *ALIASES]))}"
        )
    return found


def as_pre_tokenizer(cut: Cut) -> dict[str, Any]:
    """Return the `pre_tokenizer` of a tokenizer.json that cuts so."""
    bytes_part = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": cut.pattern is None,
    }
    parts: list[dict[str, Any]] = []
    if cut.digits:
        parts.append({"type": "Digits", "individual_digits": True})
    if cut.pattern is not None:
        parts.append(
            {
                "type": "Split",
                "pattern": {"Regex": cut.pattern},
                "behavior": "Isolated",
                "invert": False,
            }
        )
    parts.append(bytes_part)
    return {"type": "Sequence", "pretokenizers": parts} if len(parts) > 1 else bytes_part


def _simple(pre_tokenizer: Any) -> Any:
    """Reduce a pre_tokenizer to what decides where it cuts."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [one]}:
            return _simple(one)
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return [_simple(part) for part in parts]
        case dict():
            # trim_offsets concerns offsets only.
            return {key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}
    return pre_tokenizer
