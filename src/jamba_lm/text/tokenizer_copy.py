"""The files of a tokenizer, copied beside weights that were made from a model.

Knows file names, and nothing of what is in them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from jamba_lm.errors import InputError
from jamba_lm.files import write_json
from jamba_lm.gguf_file import is_gguf
from jamba_lm.text.gguf_tokenizer import folder_files, open_documents

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates"


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer of a checkpoint folder or a GGUF file, chat templates included.

    Args:
        source: what the model was loaded from.
        folder: where its successor lies; is there.

    Raises:
        InputError: the operating system refused.
    """
    if is_gguf(source):
        for name, content in folder_files(open_documents(source)).items():
            write_json(folder / name, content)
        return
    try:
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if (source / TEMPLATES).is_dir():
            (folder / TEMPLATES).mkdir(exist_ok=True)
            for path in sorted((source / TEMPLATES).glob("*.jinja")):
                shutil.copyfile(path, folder / TEMPLATES / path.name)
    except OSError as cause:
        raise InputError(
            f"cannot copy the tokenizer into {str(folder)!r}: {cause.strerror or cause}; check the "
            "permissions and the free space"
        ) from cause
