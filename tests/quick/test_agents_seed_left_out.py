"""What agents have built in, ``seed`` and ``reasoning_effort``, can be left out by the gateway's settings."""

from __future__ import annotations

import pytest

from tests.agent_kit import chat, says, scripted, user
from tests.gateway_stand_in import StandInGateway
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang import SessionSettings
from torchrl_sglang.errors import ConfigError


def test_an_override_of_none_leaves_out_what_an_agent_has_built_in() -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["ChatML"].source)
    for overrides, seed in (({}, 7), ({"seed": None}, None)):
        sessions, _ = scripted(tokenizer, lambda _: says(tokenizer, "ok", "<|im_end|>"), overrides=overrides)
        sampling = sessions.model.sampling({"seed": 7, "temperature": 0.5}, 3)
        assert (sampling.sampling_seed, sampling.temperature) == (seed, 0.5)


def test_an_effort_of_reasoning_is_left_out_where_the_settings_say_so() -> None:
    template = "{{ reasoning_effort | default('none') }}: {{ messages[-1].content }}"
    tokenizer = make_tokenizer("byte-level BPE", template)
    for overrides, effort in (({}, "low"), ({"reasoning_effort": None}, "none")):
        sessions, model = scripted(tokenizer, lambda _: says(tokenizer, "ok", "<|im_end|>"), overrides=overrides)
        chat(sessions.create(), [user("Hi")], template_kwargs={"reasoning_effort": "low"})
        assert tokenizer.decode(model.calls[0][0]) == f"{effort}: Hi"


def test_an_effort_of_reasoning_can_only_be_left_out() -> None:
    with pytest.raises(ConfigError, match="template_kwargs"):
        SessionSettings(overrides={"reasoning_effort": "low"})


def test_an_effort_that_is_left_out_is_no_error_without_the_templates_variable() -> None:
    assert StandInGateway().chat(reasoning_effort="low").status_code == 400
    assert StandInGateway(leaves_out_effort=True).chat(reasoning_effort="low").status_code == 200
