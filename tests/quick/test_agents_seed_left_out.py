"""An agent's built-in ``seed`` can be left out by the gateway's settings."""

from __future__ import annotations

from tests.agent_kit import says, scripted
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer


def test_an_override_of_none_leaves_out_what_an_agent_has_built_in() -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["ChatML"].source)
    for overrides, seed in (({}, 7), ({"seed": None}, None)):
        sessions, _ = scripted(tokenizer, lambda _: says(tokenizer, "ok", "<|im_end|>"), overrides=overrides)
        sampling = sessions.model.sampling({"seed": 7, "temperature": 0.5}, 3)
        assert (sampling.sampling_seed, sampling.temperature) == (seed, 0.5)
