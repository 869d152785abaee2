"""Stop strings across an interruption: found in rollouts and agents' turns, with little sampled behind them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.matrix.tokenizer_kinds import TOKENIZERS, make_tokenizer
from torchrl_sglang.agents.generated import Generated
from torchrl_sglang.agents.generation import Generator
from torchrl_sglang.agents.stop_strings import cut_at_stop
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.protocol.messages import GenerateReply, WeightSpan
from torchrl_sglang.protocol.stop_strings import StopStrings
from torchrl_sglang.rollout.resuming import generate_resuming

KINDS = sorted(TOKENIZERS)


def text_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    return lambda ids: str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


@dataclass
class Script:
    """A model that writes these tokens whatever the prompt, and is interrupted after each of ``cuts``.

    As a server it looks for stop strings in the tokens of one request alone.
    """

    ids: list[int]
    cuts: list[int]
    decode: Callable[[Sequence[int]], str]
    parts: list[tuple[int, int]] = field(default_factory=list)
    max_prompt_tokens: int | None = None

    def part(self, done: int, sampling: SamplingParams) -> tuple[list[int], str, str | None]:
        made: list[int] = []
        interrupted = [cut for cut in self.cuts if cut > done][:1]
        for token in self.ids[done : done + sampling.max_new_tokens]:
            made.append(token)
            matched = next((stop for stop in sampling.stop if stop in self.decode(made)), None)
            if matched is not None:
                return self.noted(made, sampling, "stop", matched)
            if [done + len(made)] == interrupted:
                self.cuts.remove(interrupted[0])
                return self.noted(made, sampling, "abort", None)
        return self.noted(made, sampling, "length", None)

    def noted(self, made: list[int], sampling: SamplingParams, *end: Any) -> Any:
        self.parts.append((len(made), sampling.max_new_tokens))
        return made, *end

    # as a pool for rollouts

    def generate(self, prompts: Any, sampling: SamplingParams, **_: Any) -> list[GenerateReply]:
        replies = []
        for prompt in prompts:
            made, reason, matched = self.part(len(prompt) - 1, sampling)
            start = len(prompt) - 1
            replies.append(
                GenerateReply(
                    output_ids=made,
                    output_logprobs=[-float(start + i) for i in range(len(made))],
                    finish_reason=reason,  # type: ignore[arg-type]
                    matched=matched,
                    text=self.decode(made),
                    weight_spans=(WeightSpan(version=str(len(self.parts)), start=0, end=len(made)),),
                )
            )
        return replies


def rollout(script: Script, sampling: SamplingParams, *, max_resumes: int = 8) -> tuple[GenerateReply, int]:
    stops = StopStrings.of(sampling, script.decode)
    (reply,), (resumes,) = generate_resuming(script, [[7]], sampling, max_resumes=max_resumes, stops=lambda: stops)
    return reply, resumes


def turn(script: Script, sampling: SamplingParams) -> Generated:
    """What an agent's turn gets."""

    class Parts:
        async def generate(self, client: Any, ids: Any, rest: Any, done: Generated, **_: Any) -> Generated:
            made, reason, matched = script.part(len(done.output_ids), rest)
            reply = GenerateReply(
                output_ids=made,
                output_logprobs=[-float(len(done.output_ids) + i) for i in range(len(made))],
                finish_reason=reason,  # type: ignore[arg-type]
                matched=matched,
            )
            return done.with_part(reply, [], versions=[len(script.parts)] * len(made))

    client = SimpleNamespace(url="http://one", config=SimpleNamespace(generate_limit_s=lambda _: 30.0))
    pool: Any = SimpleNamespace(healthy=[client], clients=[client], max_prompt_tokens=None, poll_dead_servers=list)
    stops = StopStrings.of(sampling, script.decode)

    async def story() -> Generated:
        generator = Generator(pool)
        generator._parts = Parts()  # type: ignore[assignment]
        return cut_at_stop(await generator.generate([7], sampling, stops=stops), stops)

    return asyncio.run(story())


STOPS = ["Obs:", "\nObs:", "do what", "END", "。x", "🙂!"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_response_ends_as_one_that_was_not(kind: str, stop: str) -> None:
    tokenizer = make_tokenizer(kind)
    decode = text_of(tokenizer)
    text = f"The dog EN O{stop} and then much more of it, up to the end"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    sampling = SamplingParams(max_new_tokens=len(ids), stop=(stop, "Obs: made"))
    whole = Script(ids, [], decode).part(0, sampling)
    if stop not in decode(ids):
        pytest.skip("the tokenizer has no such characters")
    assert whole[1:] == ("stop", stop)
    for cut in range(1, len(whole[0])):
        scripts = [Script(ids, [cut], decode) for _ in range(2)]
        reply, resumes = rollout(scripts[0], sampling)
        made = turn(scripts[1], sampling)
        assert (reply.output_ids, reply.finish_reason, reply.matched) == whole
        assert (made.output_ids, made.finish_reason, made.matched) == whole
        assert (resumes, made.resumes) == (1, 1)
        assert reply.output_logprobs == made.log_probs == [-float(i) for i in range(len(whole[0]))]
        assert len(made.versions) == len(whole[0])
        assert max(span.end for span in reply.weight_spans) == reply.completion_tokens == len(whole[0])
        for script in scripts:  # at most what the rest of a stop string can be is generated behind it
            assert sum(made for made, _ in script.parts) <= len(whole[0]) + 4 * len("Obs: made")


def test_nothing_is_watched_where_no_stop_string_has_begun() -> None:
    decode = "".join
    stops = StopStrings(("Obs:", "END"), (), lambda ids: decode(map(chr, ids)))
    for text, watched in (("a cat", 0), ("a cat O", 3), ("a cat OE", 2), ("a Obs", 1), ("a Obs:", 0), ("", 0)):
        assert stops.tokens_to_watch([ord(letter) for letter in text]) == watched


def test_a_beginning_that_comes_again_and_again_takes_one_resume() -> None:
    ids = [ord("a")] * 40 + [ord("b")] * 10
    sampling = SamplingParams(max_new_tokens=50, stop=("aab",))
    decode: Any = lambda ids: "".join(map(chr, ids))  # noqa: E731
    for cut in (1, 5, 40):
        script = Script(ids, [cut], decode)
        reply, resumes = rollout(script, sampling, max_resumes=1)
        assert (len(reply.output_ids), reply.finish_reason, resumes) == (41, "stop", 1)
        made = turn(Script(ids, [cut], decode), sampling)
        assert (len(made.output_ids), made.finish_reason, made.resumes) == (41, "stop", 1)


def test_a_response_that_is_interrupted_while_it_is_watched_is_continued() -> None:
    ids = [ord(letter) for letter in "a dog and ENDless"]
    decode: Any = lambda ids: "".join(map(chr, ids))  # noqa: E731
    sampling = SamplingParams(max_new_tokens=len(ids), stop=("END", "dog!"))
    cuts = [3, 4, 5, 11, 12]
    reply, resumes = rollout(Script(ids, [*cuts], decode), sampling)
    assert (decode(reply.output_ids), reply.matched, resumes) == ("a dog and END", "END", 5)
    assert turn(Script(ids, [*cuts], decode), sampling).output_ids == reply.output_ids
    few, resumes = rollout(Script(ids, [*cuts], decode), sampling, max_resumes=2)
    assert (decode(few.output_ids), few.finish_reason, resumes) == ("a dog", "abort", 2)


def test_a_response_without_its_stop_string_has_its_whole_length() -> None:
    ids = [ord(letter) for letter in "a dog and EN no more"]
    decode: Any = lambda ids: "".join(map(chr, ids))  # noqa: E731
    sampling = SamplingParams(max_new_tokens=len(ids), stop=("END",))
    for cut in range(1, len(ids)):
        reply, resumes = rollout(Script(ids, [cut], decode), sampling)
        assert (reply.output_ids, reply.finish_reason, resumes) == (ids, "length", 1)
        made = turn(Script(ids, [cut], decode), sampling)
        assert (made.output_ids, made.finish_reason, made.resumes) == (ids, "length", 1)


def test_an_expression_across_an_interruption_ends_the_response() -> None:
    ids = [ord(letter) for letter in "so 12+34 is more"]
    decode: Any = lambda ids: "".join(map(chr, ids))  # noqa: E731
    sampling = SamplingParams(max_new_tokens=len(ids), stop_regex=(r"\d+\+\d",))
    for cut in range(4, 7):
        reply, _ = rollout(Script(ids, [cut], decode), sampling)
        assert (decode(reply.output_ids), reply.matched) == ("so 12+3", r"\d+\+\d")
        assert turn(Script(ids, [cut], decode), sampling).output_ids == reply.output_ids


def test_of_two_stop_strings_that_a_token_completes_the_first_one_given_counts() -> None:
    decode: Any = lambda ids: "".join(ids)  # noqa: E731
    for given in itertools.permutations(("b", "ab")):
        assert StopStrings(given, (), decode).find(["a", "b", "c"]) == (2, given[0])  # type: ignore[arg-type]


def test_a_response_that_its_server_ended_stays_as_it_is() -> None:
    decode: Any = lambda ids: "".join(map(chr, ids))  # noqa: E731
    made = Generated(output_ids=[97, 98], matched="b", finish_reason="stop", resumes=1)
    assert cut_at_stop(made, StopStrings(("ab", "b"), (), decode)) is made
    untouched = replace(made, resumes=0, matched=None)
    assert cut_at_stop(untouched, StopStrings(("a",), (), decode)) is untouched
