"""Run, train, serve and study Jamba, the hybrid of Mamba, attention and mixtures of experts.

Names are looked up when they are first used, so that importing this package, or planning with it,
does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jamba_lm.config import JambaConfig as JambaConfig
    from jamba_lm.generation import generate as generate
    from jamba_lm.language_model import LanguageModel as LanguageModel
    from jamba_lm.language_model import from_config as from_config
    from jamba_lm.language_model import load as load
    from jamba_lm.language_model import load_state as load_state
    from jamba_lm.native_model import NativeModel as NativeModel
    from jamba_lm.native_model import load_native as load_native
    from jamba_lm.presets import embedded_model_path as embedded_model_path
    from jamba_lm.sampling import Sampling as Sampling
    from jamba_lm.text.tokenizer import load_tokenizer as load_tokenizer

__version__ = "0.1.0"

_HOMES = {
    "JambaConfig": "config",
    "LanguageModel": "language_model",
    "NativeModel": "native_model",
    "Sampling": "sampling",
    "embedded_model_path": "presets",
    "from_config": "language_model",
    "generate": "generation",
    "load": "language_model",
    "load_native": "native_model",
    "load_state": "language_model",
    "load_tokenizer": "text.tokenizer",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
