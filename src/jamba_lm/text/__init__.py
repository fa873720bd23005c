"""Text <-> token ids: tokenizers, chat templates, and how a tokenizer is trained."""
