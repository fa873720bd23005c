"""Hugging Face's `config.json`, key by key: its name here, or why it may be ignored, or refused.

Translates names and checks what cannot be said by a field of ours. Knows nothing of ranges: that
is `config.py`, which stands on this file.

A key falls in one of four groups. It is a field of ours under another name (`FIELDS`); it cannot
change what the model computes, and is accepted by name with the reason (`NO_EFFECT`); it can
change what the model computes, and is accepted only with a value that does not (`ONLY`); or it is
unknown, and an error.

Source: transformers' `configuration_jamba.py` (4.40 to 5.23) and the files of released models.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from jamba_lm.errors import ConfigError

PUBLIC_TYPE = "jamba"
"""The `model_type` that transformers, vLLM and llama.cpp read."""

OWN_TYPE = "jamba_lm"
"""The `model_type` of what only this project computes, so that the others refuse it."""

QUANTIZATION_METHOD = "jamba_lm"
"""The `quant_method` of weights that this project packed; its details are `quantization/policy`'s.

It is accepted under `OWN_TYPE` only: transformers skips a method that it does not know, and would
fill the model with random weights.
"""

ARCHITECTURES: Mapping[str, str] = {PUBLIC_TYPE: "JambaForCausalLM", OWN_TYPE: "JambaLM"}

FIELDS: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "d_head",
    "attn_layer_period": "attention_period",
    "attn_layer_offset": "attention_offset",
    "expert_layer_period": "expert_period",
    "expert_layer_offset": "expert_offset",
    "num_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_width",
    "mamba_expand": "expand",
    "mamba_dt_rank": "dt_rank",
    "mamba_conv_bias": "conv_bias",
    "mamba_proj_bias": "proj_bias",
    "mamba_inner_layernorms": "inner_norms",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initializer_range",
    "router_aux_loss_coef": "aux_loss_coef",
    "pad_token_id": "pad_id",
    "bos_token_id": "bos_id",
    "eos_token_id": "eos_ids",
    "max_position_embeddings": "context_length",
}

OWN_FIELDS: Mapping[str, str] = {"position": "position", "rope_theta": "rope_theta"}
"""Keys that mean something only under `OWN_TYPE`."""

ALIASES: Mapping[str, str] = {
    "num_local_experts": "num_experts",
    "n_ctx": "max_position_embeddings",
}

_SPEED = "chooses an implementation in transformers, not a result"
_LOGITS = "says which logits transformers returns; a caller asks for rows here"
_OUTPUTS = "says which extra outputs transformers returns"
_LABEL = "belongs to a classification head, which a causal language model does not have"
_ORIGIN = "says where the file came from"
_SAMPLING = "belongs in generation_config.json; transformers 5 drops it from config.json as well"

NO_EFFECT: Mapping[str, str] = {
    "use_cache": "a state is always kept when a caller passes one",
    "use_mamba_kernels": _SPEED,
    "use_mambapy": _SPEED,
    "use_associative_scan": _SPEED,
    "attn_implementation": _SPEED,
    "_attn_implementation": _SPEED,
    "_attn_implementation_autoset": _SPEED,
    "experts_implementation": _SPEED,
    "_experts_implementation": _SPEED,
    "chunk_size_feed_forward": _SPEED,
    "dtype": "each tensor in a weight file says its own type",
    "torch_dtype": "each tensor in a weight file says its own type",
    "calc_logits_for_entire_prompt": _LOGITS,
    "num_logits_to_keep": _LOGITS,
    "output_router_logits": "the balance loss of training is always computed, and logged apart",
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "return_dict": _OUTPUTS,
    "tie_last_hidden_states": _OUTPUTS,
    "is_decoder": "a causal language model is one in any case",
    "torchscript": _OUTPUTS,
    "tf_legacy_loss": _OUTPUTS,
    "use_bfloat16": "was read by transformers on TPUs only, and by none since 5",
    "tokenizer_class": "a tokenizer is described by its own files",
    "prefix": "a tokenizer is described by its own files",
    "sep_token_id": "a tokenizer is described by its own files",
    "decoder_start_token_id": "starts the decoder of an encoder-decoder, which this is not",
    "auto_map": "names Python code inside the checkpoint, which is never run here",
    "transformers_version": _ORIGIN,
    "_name_or_path": _ORIGIN,
    "name_or_path": _ORIGIN,
    "_commit_hash": _ORIGIN,
    "_from_model_config": _ORIGIN,
    "unsloth_version": _ORIGIN,
    "unsloth_fixed": _ORIGIN,
    "id2label": _LABEL,
    "label2id": _LABEL,
    "num_labels": _LABEL,
    "problem_type": _LABEL,
    "finetuning_task": _LABEL,
    "task_specific_params": _LABEL,
    "max_length": _SAMPLING,
    "max_new_tokens": _SAMPLING,
    "min_length": _SAMPLING,
    "do_sample": _SAMPLING,
    "early_stopping": _SAMPLING,
    "num_beams": _SAMPLING,
    "num_beam_groups": _SAMPLING,
    "diversity_penalty": _SAMPLING,
    "temperature": _SAMPLING,
    "top_k": _SAMPLING,
    "top_p": _SAMPLING,
    "typical_p": _SAMPLING,
    "repetition_penalty": _SAMPLING,
    "length_penalty": _SAMPLING,
    "no_repeat_ngram_size": _SAMPLING,
    "num_return_sequences": _SAMPLING,
    "encoder_no_repeat_ngram_size": _SAMPLING,
    "bad_words_ids": _SAMPLING,
    "suppress_tokens": _SAMPLING,
    "begin_suppress_tokens": _SAMPLING,
    "forced_bos_token_id": _SAMPLING,
    "forced_eos_token_id": _SAMPLING,
    "exponential_decay_length_penalty": _SAMPLING,
    "remove_invalid_values": _SAMPLING,
    "return_dict_in_generate": _SAMPLING,
    "output_scores": _SAMPLING,
}

_NO_DROPOUT = "no dropout is applied here, in training either; write 0.0 to train without it"
_NO_ROPE = (
    "Jamba's attention has no positions; for the rotary variant write "
    f'"model_type": "{OWN_TYPE}" and "position": "rope"'
)
_NO_QUANTIZED = (
    "weights that another program has quantised cannot be read; take the original checkpoint, "
    "and `jamba quantize` it"
)
_NOT_JAMBA = "a Jamba model has no such part"

ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "only SwiGLU is computed"),
    "attention_dropout": ((0.0,), _NO_DROPOUT),
    "sliding_window": ((None,), "attention always sees the whole past"),
    "rope_theta": ((None,), _NO_ROPE),
    "rope_scaling": ((None,), _NO_ROPE),
    "rope_parameters": ((None,), _NO_ROPE),
    "attention_bias": ((False, None), "the attention projections have no bias"),
    "mlp_bias": ((False, None), "the MLP projections have no bias"),
    "quantization_config": ((None,), _NO_QUANTIZED),
    "quantization": ((None,), _NO_QUANTIZED),
    "compression_config": ((None,), _NO_QUANTIZED),
    "per_layer_config": ((None, {}), "all layers of a kind have the same sizes"),
    "is_encoder_decoder": ((False, None), _NOT_JAMBA),
    "add_cross_attention": ((False, None), _NOT_JAMBA),
    "cross_attention_hidden_size": ((None,), _NOT_JAMBA),
    "tie_encoder_decoder": ((False, None), _NOT_JAMBA),
    "pruned_heads": ((None, {}), "no head can be missing"),
}

_PATTERNS = ("layers_block_type", "layer_types", "layers_num_experts")
_CHECKED = ("model_type", "architectures", *_PATTERNS)


def shown(value: object) -> str:
    """Write any value on one short line, for a message.

    >>> shown("x" * 100)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..."
    """
    if isinstance(value, list | tuple | dict):
        # The repr of a large container would be built in full only to be cut.
        return f"a {type(value).__name__} of {len(value)}" if len(value) > 8 else _cut(repr(value))
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    return _cut(repr(value[:60] if isinstance(value, str) else value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:56] + "..."


def closest(key: object, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name that looks most like `key`, or nothing.

    >>> closest("num_head", ["num_heads", "d_ff"])
    "; did you mean 'num_heads'?"
    """
    if not isinstance(key, str):
        return ""
    close = difflib.get_close_matches(key[:80], list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the content of a `config.json` into our field names, ranges unchecked.

    Raises:
        ConfigError: not a Jamba file; an unknown key; a value we cannot honour; two keys that
            contradict each other.
    """
    own = _model_type(values) == OWN_TYPE
    fields = {**FIELDS, **OWN_FIELDS} if own else FIELDS
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = ALIASES.get(key, key) if isinstance(key, str) else key
        if name in fields:
            if name in found and found[name] != value:
                raise ConfigError(
                    f"config.json gives {name} under two names, as {shown(found[name])} and as "
                    f"{shown(value)}; remove the wrong one of {name} and {_alias_of(name)}"
                )
            found[name] = value
        elif own and name == "quantization_config" and _is_our_packing(value):
            continue
        elif name in ONLY:
            allowed, reason = ONLY[name]
            if value not in allowed:
                raise ConfigError(
                    f"config.json has {name}={shown(value)}, expected "
                    f"{' or '.join(shown(v) for v in allowed)}: {reason}"
                )
        elif name not in NO_EFFECT and name not in _CHECKED:
            hint = closest(key, [*fields, *ALIASES, *NO_EFFECT, *ONLY, *_CHECKED])
            raise ConfigError(
                f"unknown key {shown(key)} in config.json"
                + (hint or "; it might change the model: remove it if it does not")
            )
    return _ours(found, fields)


def _is_our_packing(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("quant_method") == QUANTIZATION_METHOD


def _alias_of(name: str) -> str:
    return next(alias for alias, real in ALIASES.items() if real == name)


def _model_type(values: Mapping[str, Any]) -> str:
    given = values.get("model_type")
    if not isinstance(given, str) or given not in ARCHITECTURES:
        raise ConfigError(
            f"config.json has model_type={shown(given)}, expected {PUBLIC_TYPE!r}: "
            "only Jamba models can be read"
        )
    architectures, expected = values.get("architectures"), ARCHITECTURES[given]
    if architectures is not None and architectures != [expected]:
        raise ConfigError(
            f"config.json has architectures={shown(architectures)}, expected [{expected!r}]: "
            "only causal language models can be read"
        )
    return given


def _ours(found: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Rename, and give transformers' words for "by default" and "none" our meaning."""
    ours = {fields[name]: value for name, value in found.items()}
    if ours.get("dt_rank") == "auto":
        ours["dt_rank"] = None
    if "eos_ids" in ours:
        eos = ours["eos_ids"]
        ours["eos_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return ours


def check_patterns(values: Mapping[str, Any], written: Mapping[str, list[Any]]) -> None:
    """Refuse a per-layer list that contradicts the periods and offsets.

    transformers derives these lists and never reads them; a file that carries one was written by
    a program that may have meant it.

    Args:
        values: the content of `config.json`.
        written: what each list must be, from `write_patterns`.

    Raises:
        ConfigError: the first list that differs.
    """
    for key in _PATTERNS:
        if values.get(key) is not None and values[key] != written[key]:
            raise ConfigError(
                f"config.json has {key}={shown(values[key])}, which contradicts its layer period "
                f"and offset ({shown(written[key])}); only regular patterns can be expressed: "
                "correct the period and offset, or remove the list"
            )


def write_patterns(fields: Mapping[str, Any]) -> dict[str, list[Any]]:
    """List what transformers would derive for each layer, from our field names.

    >>> write_patterns(dict(num_layers=3, attention_period=2, attention_offset=1,
    ...     expert_period=2, expert_offset=0, num_experts=4))["layers_block_type"]
    ['mamba', 'attention', 'mamba']
    """

    def every(common: object, special: object, kind: str) -> list[Any]:
        # A slice instead of a modulo: model/layout.py is the only place that has the modulo, and a
        # test holds the two together.
        layers = [common] * fields["num_layers"]
        places = slice(fields[f"{kind}_offset"], None, fields[f"{kind}_period"])
        layers[places] = [special] * len(layers[places])
        return layers

    return {
        "layers_block_type": every("mamba", "attention", "attention"),
        "layer_types": every("linear_attention", "full_attention", "attention"),
        "layers_num_experts": every(1, fields["num_experts"], "expert"),
    }


def write_fields(fields: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
    """Build the content of a `config.json` from our field names and values.

    With `own`, the list of layers is written as well: transformers cannot set it, so that even a
    caller who names its `JambaConfig` class instead of letting the file choose gets an error.

    Args:
        fields: every field of ours, resolved.
        own: write `OWN_TYPE` and the keys that only we read.
    """
    model_type = OWN_TYPE if own else PUBLIC_TYPE
    names = {**FIELDS, **OWN_FIELDS} if own else FIELDS
    content: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    content |= {name: fields[ours] for name, ours in names.items()}
    eos = fields["eos_ids"]
    content["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    if own:
        content["layers_block_type"] = write_patterns(fields)["layers_block_type"]
    else:
        del content["mamba_inner_layernorms"]
        if fields["d_head"] == fields["d_model"] // fields["num_heads"]:
            # transformers before 5 does not know the key, and derives the same number.
            del content["head_dim"]
    return content


def ignored(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of a readable `config.json` that have no effect here, with the reasons."""
    return {key: NO_EFFECT[key] for key in values if key in NO_EFFECT}
