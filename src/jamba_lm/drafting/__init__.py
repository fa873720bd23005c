"""Guessing the next tokens without a model: what to guess, and when a guess is worth its time."""
