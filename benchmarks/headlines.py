"""Is a headline sarcastic? The embedded model asked with examples, and after it was fine-tuned.

    python recipes/headlines.py --out corpus/headlines
    jamba finetune recipes/headlines_lora.toml --out runs/headlines-lora
    jamba finetune recipes/headlines_full.toml --out runs/headlines-full
    python -m benchmarks.headlines --adapter runs/headlines-lora/adapter \
        --tuned runs/headlines-full/model --shots 0,4,8,16,32 --json docs/results/finetune.json

Every headline that is held out (by a hash of its text) is put in the same form, `HEADLINE` and
`Sarcasm:` on a line each, and the label is the one of the two that the model finds more probable:
the sum of the log-probabilities of its tokens. Few-shot prompts are drawn from the training side,
as many of each label, with a seed. Since a model that was not tuned leans to one label whatever it
is asked, its best threshold on headlines of the training side is tried, too, and the better of the
two counts for it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import jamba_lm
from benchmarks.record import hardware, write_json
from jamba_lm.language_model import LanguageModel
from jamba_lm.model.state import SequenceState
from jamba_lm.presets import embedded_model_path
from jamba_lm.text.tokenizer import Tokenizer

LABELS = (" no", " yes")
CALL_SEQUENCES = 32
CALIBRATION_HEADLINES = 400


@dataclass(frozen=True, slots=True)
class Headline:
    """A prompt, and which of the labels is right."""

    prompt: str
    label: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How many headlines got the right label.

    Attributes:
        name: who was asked, and how.
        shots: examples in the prompt.
        accuracy: share of right answers when the more probable label is taken.
        calibrated: likewise behind the threshold that is best on the training side.
        interval: half the width of the 95 % interval of either.
    """

    name: str
    shots: int
    accuracy: float
    calibrated: float
    interval: float


def read_headlines(path: Path) -> list[Headline]:
    """Read what `recipes/headlines.py` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Headline(row["prompt"], LABELS.index(row["completion"])) for row in rows]


def shots_of(training: Sequence[Headline], count: int, seed: int) -> str:
    """Return the beginning of a prompt: as many examples of each label, in a drawn order."""
    draw = random.Random(seed)
    chosen = [
        one
        for label in range(len(LABELS))
        for one in draw.sample([h for h in training if h.label == label], count // 2)
    ]
    draw.shuffle(chosen)
    return "".join(f"{one.prompt}{LABELS[one.label]}\n\n" for one in chosen)


class Judge:
    """A model that is asked for labels behind one and the same beginning."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, beginning: str) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._state = model.new_state()
        # The beginning is read once: every headline goes on from a fork of its state.
        model.next_logits([tokenizer.encode_parts([beginning])[0]], [self._state])
        self._labels = [tokenizer.encode_parts(["", label])[1] for label in LABELS]

    def odds(self, headlines: Sequence[Headline]) -> torch.Tensor:
        """Return log p(yes) - log p(no) of each headline, float64."""
        return torch.cat([self._call(part) for part in _parts(headlines)])

    def _call(self, headlines: Sequence[Headline]) -> torch.Tensor:
        prompts = [self._tokenizer.encode_parts(["", one.prompt])[1] for one in headlines]
        states = [self._state.fork() for _ in prompts]
        first = self._model.next_logits(prompts, states).double().log_softmax(-1)
        scores = []
        for label in self._labels:
            score = first[:, label[0]]
            if len(label) > 1:
                score = score + self._rest(label, states)
            scores.append(score)
        return scores[1] - scores[0]

    def _rest(self, label: list[int], states: Sequence[SequenceState]) -> torch.Tensor:
        forks = [state.fork() for state in states]
        logits = self._model.logits([label[:-1]] * len(forks), forks)
        following = torch.tensor(label[1:])[:, None]
        return torch.stack(
            [one.double().log_softmax(-1).gather(1, following).sum() for one in logits]
        )


def _parts(headlines: Sequence[Headline]) -> Iterator[Sequence[Headline]]:
    for first in range(0, len(headlines), CALL_SEQUENCES):
        yield headlines[first : first + CALL_SEQUENCES]


def best_threshold(odds: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the threshold that tells apart most of these."""
    candidates = odds.sort().values
    right = [((odds > one).long() == labels).float().mean().item() for one in candidates]
    return float(candidates[max(range(len(right)), key=right.__getitem__)])


def measure(
    name: str,
    judge: Judge,
    shots: int,
    held_out: Sequence[Headline],
    training: Sequence[Headline],
) -> Accuracy:
    """Ask for every held-out headline."""
    labels = torch.tensor([one.label for one in held_out])
    odds = judge.odds(held_out)
    some = random.Random(0).sample(list(training), CALIBRATION_HEADLINES)
    threshold = best_threshold(judge.odds(some), torch.tensor([one.label for one in some]))
    accuracy, calibrated = (
        ((odds > at).long() == labels).double().mean().item() for at in (0.0, threshold)
    )
    worst = math.sqrt(accuracy * (1 - accuracy) / len(labels))
    return Accuracy(
        name=name, shots=shots, accuracy=accuracy, calibrated=calibrated, interval=1.96 * worst
    )


def main() -> None:
    """Measure few-shot prompts and every tuned model, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("corpus/headlines"))
    parser.add_argument("--model", type=Path, default=embedded_model_path())
    parser.add_argument("--shots", default="0,4,16,32", help="examples in the prompt, by commas")
    parser.add_argument("--seeds", type=int, default=1, help="draws of the examples")
    parser.add_argument("--adapter", type=Path, action="append", default=[])
    parser.add_argument("--tuned", type=Path, action="append", default=[])
    parser.add_argument("--most", type=int, help="of the held-out headlines; all when left out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    held_out = read_headlines(options.data / "validation.jsonl")[: options.most]
    training = read_headlines(options.data / "train.jsonl")
    tokenizer = jamba_lm.load_tokenizer(options.model)

    found: list[Accuracy] = []

    def ask(name: str, model: LanguageModel, beginning: str = "", shots: int = 0) -> None:
        judge = Judge(model, tokenizer, beginning)
        found.append(measure(name, judge, shots, held_out, training))
        one = found[-1]
        print(
            f"{one.name:44}{100 * one.accuracy:7.2f} %{100 * one.calibrated:9.2f} % calibrated"
            f"   +- {100 * one.interval:.2f}",
            flush=True,
        )

    base = jamba_lm.load(options.model)
    for shots in map(int, options.shots.split(",")):
        for seed in range(options.seeds if shots else 1):
            name = f"few-shot, {shots} examples, seed {seed}"
            ask(name, base, shots_of(training, shots, seed), shots)
    few_shot = max(max(one.accuracy, one.calibrated) for one in found)
    for path in options.adapter:
        ask(f"adapter {path}", jamba_lm.load(options.model, adapter=path))
    for path in options.tuned:
        ask(f"tuned {path}", jamba_lm.load(path))
    majority = max(sum(h.label == label for h in held_out) for label in range(len(LABELS)))
    tuned = [one.accuracy - few_shot for one in found if not one.name.startswith("few-shot")]
    print(f"{'always the more frequent label':44}{100 * majority / len(held_out):7.2f} %")
    for margin in tuned:
        print(f"above the best few-shot prompt by {100 * margin:.2f} points")
    write_json(
        options.json,
        {
            "headlines": len(held_out),
            "majority": majority / len(held_out),
            "best_few_shot": few_shot,
            "results": [asdict(one) for one in found],
            "hardware": hardware(),
        },
    )


if __name__ == "__main__":
    main()
