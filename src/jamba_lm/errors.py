"""The ways to be told no: what a person using this project can get wrong, and fix.

Every message says what was given, what was expected and what to do, on one line. The command line
prints it as `error: ...` and exits with status 2; any other exception is a bug of ours and keeps
its traceback.
"""


class JambaError(Exception):
    """Something that the person who asked can fix; the base of every error below."""


class ConfigError(JambaError):
    """A model configuration is impossible, contradictory or not understood."""


class CheckpointError(JambaError):
    """A weight file or checkpoint folder is missing, damaged or does not fit its configuration."""


class TokenizerError(JambaError):
    """A tokenizer file, chat template or training corpus of a tokenizer cannot be used."""


class StateError(JambaError):
    """A saved sequence state is damaged or belongs to another model."""


class RecipeError(JambaError):
    """A training recipe has an unknown key or an impossible value."""


class DataError(JambaError):
    """Training or evaluation data is missing, empty or damaged."""


class InputError(JambaError):
    """A prompt, an option or an output path cannot be used."""


class BackendUnavailable(JambaError):
    """A back-end was asked for by name and cannot run the operation here."""


class CapacityError(JambaError):
    """The work does not fit into the memory or the limits it was given."""


class ProcessError(JambaError):
    """Processes that work together cannot start as they are, or lost one of them."""
