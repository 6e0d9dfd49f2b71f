"""What a served answer takes beside its model alone: prompts with examples, a draft model that guesses ahead."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import BadValue
from .estimate import Times


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """Seconds of answers of `new_tokens` tokens each, `batch_size` at a time: the prompt once, then token by token."""

    batch_size: int
    new_tokens: int
    prefill_s: float
    decode_s_per_token: float

    @property
    def total_s(self) -> float:
        """Seconds of the whole batch; prefill gives the first token."""
        return self.prefill_s + (self.new_tokens - 1) * self.decode_s_per_token

    @property
    def s_per_token(self) -> float:
        """Seconds a new token, prefill shared among them: what falls as more tokens are generated."""
        return self.total_s / (self.new_tokens * self.batch_size)


def answering(times: Times, *, batch_size: int, new_tokens: int) -> Answering:
    """Spread a generation's times over its tokens. Raises BadValue for the times of something else."""
    if times.prefill_s is None:
        raise BadValue("these are not the times of a generation", value=times, todo='Estimate with phase "generate".')
    return Answering(
        batch_size=batch_size,
        new_tokens=new_tokens,
        prefill_s=times.prefill_s,
        decode_s_per_token=times.decode_s_per_token or 0.0,
    )


def with_examples(prefill_len: int, *, shots: int, shot_tokens: int) -> int:
    """Return the prompt's tokens with k examples of so many tokens in front. Raises BadValue for negative numbers."""
    if shots < 0 or shot_tokens < 1:
        raise BadValue(
            "shots must not be negative, nor empty",
            value=(shots, shot_tokens),
            todo="Give --shots 4 --shot-tokens 100.",
        )
    return prefill_len + shots * shot_tokens


def accepted_tokens(acceptance: float, draft_tokens: int) -> float:
    """Return the mean tokens a round of speculative decoding gives: (1 - a^(g + 1)) / (1 - a), the target's own included.

    Leviathan, Kalman, Matias 2023 (arXiv:2211.17192), equation 1. Raises BadValue for a rate outside 0 to 1.
    """
    if not 0 <= acceptance <= 1:
        raise BadValue("acceptance must be a share", value=acceptance, todo="Give 0 to 1; 0.6 to 0.8 is usual.")
    if draft_tokens < 1:
        raise BadValue("draft tokens must be positive", value=draft_tokens, todo="Give 1 or more; 4 to 8 is usual.")
    if acceptance == 1:
        return draft_tokens + 1.0
    return (1 - acceptance ** (draft_tokens + 1)) / (1 - acceptance)


def speculative(
    target: Answering, draft: Answering, verify_s: float, *, acceptance: float, draft_tokens: int
) -> Answering:
    """Let a draft guess `draft_tokens` at a time, which the target verifies in one pass of `verify_s`.

    Both read the prompt. What is rejected is thrown away, so that the answers are the target's own.
    """
    round_s = draft_tokens * draft.decode_s_per_token + verify_s
    return Answering(
        batch_size=target.batch_size,
        new_tokens=target.new_tokens,
        prefill_s=target.prefill_s + draft.prefill_s,
        decode_s_per_token=round_s / accepted_tokens(acceptance, draft_tokens),
    )
