"""An answer on its way to the reader: streamed, collected and timed.

Knows neither the model nor where the tokens come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from jamba_lm.cli.output import Output
from jamba_lm.cli.quantities import show_count

if TYPE_CHECKING:
    from jamba_lm.drafting.lookup import DraftCounts
    from jamba_lm.generation import GeneratedToken


class Answer:
    """What was generated so far, and how long it took.

    Attributes:
        num_prompt_tokens: tokens that were read for it.
        tokens: the tokens, in order.
        text: what was shown.
        finish_reason: why it ended; "interrupted" until it has.
        first_token_seconds: from the start to the first token: reading the prompt, and one pick.
        decode_seconds: from the first token to the last.
    """

    def __init__(self, num_prompt_tokens: int = 0) -> None:
        """Start the clock. The number of tokens to read may be told later."""
        self.num_prompt_tokens = num_prompt_tokens
        self.tokens: list[GeneratedToken] = []
        self.text = ""
        self.finish_reason = "interrupted"
        self.first_token_seconds = 0.0
        self.decode_seconds = 0.0
        self._started = time.perf_counter()

    def stream(
        self,
        tokens: Iterator[GeneratedToken],
        output: Output,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Print tokens as they come, until they end or `interrupted` says so.

        What has come stays when an exception, such as Ctrl-C, ends it.
        """
        for token in tokens:
            now = time.perf_counter() - self._started
            if not self.tokens:
                self.first_token_seconds = now
            self.decode_seconds = now - self.first_token_seconds
            self.tokens.append(token)
            self.text += token.text
            output.write(token.text)
            if token.finish_reason is not None:
                self.finish_reason = token.finish_reason
            elif interrupted():
                return

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens over the time to the first token; None before that."""
        if not self.first_token_seconds:
            return None
        return self.num_prompt_tokens / self.first_token_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first over the time they took; None without any."""
        if not self.decode_seconds:
            return None
        return (len(self.tokens) - 1) / self.decode_seconds

    @property
    def drafting(self) -> DraftCounts | None:
        """What drafting did; None without, and before the first token."""
        return self.tokens[-1].drafting if self.tokens else None

    def timing_line(self) -> str:
        """Say on one line what was read and written, and how fast."""
        read = f"{self.num_prompt_tokens:,} prompt tokens"
        if self.prefill_tokens_per_second is None:
            return f"{read}, interrupted before the first new token"
        parts = [
            f"{read} at {self.prefill_tokens_per_second:,.0f} tokens/s",
            f"first token after {self.first_token_seconds:.3f} s",
            f"{len(self.tokens):,} new tokens",
        ]
        if self.decode_tokens_per_second is not None:
            parts[-1] += f" at {self.decode_tokens_per_second:,.1f} tokens/s"
        if self.drafting is not None:
            counts = self.drafting
            parts.append(
                f"{counts.accepted:,} of {counts.proposed:,} drafted tokens accepted in "
                f"{show_count(counts.calls, 'call')}"
            )
        return ", ".join(parts)

    def values(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        values: dict[str, Any] = {
            "text": self.text,
            "ids": [token.id for token in self.tokens],
            "finish_reason": self.finish_reason,
            "timing": {
                "prompt_tokens": self.num_prompt_tokens,
                "new_tokens": len(self.tokens),
                "first_token_seconds": self.first_token_seconds,
                "prefill_tokens_per_second": self.prefill_tokens_per_second,
                "decode_tokens_per_second": self.decode_tokens_per_second,
            },
        }
        if self.drafting is not None:
            values["drafting"] = self.drafting._asdict()
        if any(token.logprob is not None for token in self.tokens):
            values["logprobs"] = [
                {
                    "id": token.id,
                    "logprob": token.logprob,
                    "top": [{"id": top, "logprob": logprob} for top, logprob in token.top_logprobs],
                }
                for token in self.tokens
            ]
        return values
