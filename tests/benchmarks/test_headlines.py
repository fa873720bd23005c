"""The labels that are compared, and the prompts that are put."""

from __future__ import annotations

import pytest
import torch

from benchmarks.headlines import LABELS, Headline, Judge, best_threshold, shots_of
from jamba_lm.language_model import load
from jamba_lm.text.tokenizer import load_tokenizer

HEADLINES = [Headline(f"the river ran {number} times\nSarcasm:", number % 2) for number in range(9)]


def test_odds_are_those_of_the_whole_texts(tiny_checkpoint):
    model, tokenizer = load(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    beginning = shots_of(HEADLINES, 4, seed=1)
    found = Judge(model, tokenizer, beginning).odds(HEADLINES[:3])
    for odds, one in zip(found.tolist(), HEADLINES, strict=False):
        scores = []
        for label in LABELS:
            parts = tokenizer.encode_parts([beginning, one.prompt, label])
            ids = [i for part in parts for i in part]
            logs = model.logits([ids[:-1]])[0].double().log_softmax(-1)
            count = len(parts[-1])
            targets = torch.tensor(ids[-count:])[:, None]
            scores.append(logs[-count:].gather(1, targets).sum().item())
        assert odds == pytest.approx(scores[1] - scores[0], abs=1e-3)


def test_shots_hold_as_many_of_each_label():
    text = shots_of(HEADLINES, 6, seed=0)
    assert [text.count(f"Sarcasm:{label}\n") for label in LABELS] == [3, 3]
    assert text != shots_of(HEADLINES, 6, seed=1)


def test_the_best_threshold_is_found():
    odds = torch.tensor([-3.0, -2.0, -1.0, 4.0])
    assert best_threshold(odds, torch.tensor([0, 0, 1, 1])) == -2.0
