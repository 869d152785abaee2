"""Replies of /generate, as SGLang writes them."""

from __future__ import annotations

from typing import Any

import pytest

from torchrl_sglang.errors import ProtocolError, WeightSyncError
from torchrl_sglang.pool.checks import refuse_mixed_weights
from torchrl_sglang.protocol.generate import parse_generate, parse_one


def answer(ids: list[int], log_probs: list[float]) -> dict[str, Any]:
    return {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": "length", "length": len(ids)},
            "output_token_logprobs": [[value, 7, None] for value in log_probs],
            "input_token_logprobs": [[None, 1, None], [-0.5, 2, None]],
            "prompt_tokens": 2,
            "completion_tokens": len(ids),
            "cached_tokens": 0,
            "weight_version": "3",
        },
    }


def test_the_log_prob_of_a_discarded_token_is_dropped() -> None:
    (reply,) = parse_generate([answer([], [-1.25])], num_expected=1, server="s", prompt_logprobs=True)
    assert reply.output_ids == []
    assert reply.output_logprobs == []
    assert reply.prompt_logprobs == [None, -0.5]


def test_a_stream_event_before_the_last_has_no_weight_spans() -> None:
    event = answer([4, 5], [-0.5, -0.5])
    event["meta_info"] |= {"finish_reason": None, "weight_version": "dirty-4@me"}
    reply = parse_one(event, server="s")
    assert reply.weight_spans == ()
    refuse_mixed_weights([reply])  # the mark came after the tokens
    event["meta_info"]["finish_reason"] = {"type": "length", "length": 2}
    with pytest.raises(WeightSyncError):
        refuse_mixed_weights([parse_one(event, server="s")])


@pytest.mark.parametrize("log_probs", [[], [-0.5], [-0.5, -0.5, -0.5]])
def test_log_probs_of_another_length_than_the_tokens_are_refused(log_probs: list[float]) -> None:
    with pytest.raises(ProtocolError, match=f"{len(log_probs)} log-probs for 2 tokens"):
        parse_generate([answer([4, 5], log_probs)], num_expected=1, server="s")
