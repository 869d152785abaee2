"""For tests of agents' sessions: a scripted model in place of servers, a client that rewrites messages, and the check
that what a session recorded is what was sent and sampled."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from torchrl_sglang.agents.generated import Generated, OnTokens
from torchrl_sglang.agents.image_tokens import PromptImages
from torchrl_sglang.agents.served_model import ServedModel
from torchrl_sglang.agents.session import Session
from torchrl_sglang.agents.sessions import Sessions
from torchrl_sglang.agents.settings import SessionSettings
from torchrl_sglang.agents.types import ChatRequest, Progress, Trajectory, Turn
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.protocol.limits import check_prompts
from torchrl_sglang.protocol.messages import ServerInfo
from torchrl_sglang.protocol.stop_strings import StopStrings


@dataclass(frozen=True)
class Sampled:
    """What the scripted model samples: tokens, and how it ended."""

    ids: tuple[int, ...]
    finish_reason: str = "stop"
    matched: int | str | None = None


class ScriptedPool:
    """The part of a pool that sessions need besides generation."""

    def __init__(self, *, vocab_size: int = 1000, context_length: int = 100_000, model_path: str = "none") -> None:
        self.vocab_size, self.context_length, self.max_prompt_tokens = vocab_size, context_length, context_length - 1
        self.info = ServerInfo(url="http://scripted", version="0.5.23", model_path=model_path, tokenizer_path="none")
        self.clients: tuple[Any, ...] = ()

    def connect(self) -> None:
        """Nothing to connect to."""

    def check(self, ids_B_T: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        """As a pool checks prompts."""
        check_prompts(
            ids_B_T,
            max_new_tokens=sampling.max_new_tokens,
            vocab_size=self.vocab_size,
            max_prompt_tokens=self.max_prompt_tokens,
            context_length=self.context_length,
        )


@dataclass
class ScriptedGenerator:
    """Samples what ``answer`` says for a prompt, and notes every call.

    ``version`` is that of the weights; ``gate`` holds all calls while it is cleared; ``expand`` puts the images' tokens
    into a prompt.
    """

    answer: Callable[[list[int]], Sampled]
    version: int = 0
    calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    expand: Callable[[list[int], PromptImages], list[int]] | None = None
    started: int = 0
    gate: asyncio.Event | None = None

    async def generate(
        self,
        ids_P: Sequence[int],
        sampling: SamplingParams,
        *,
        top_logprobs: int = 0,
        preferred: str | None = None,
        timeout_s: float | None = None,
        images: PromptImages | None = None,
        stops: StopStrings | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generated:
        self.started += 1
        sampled = self.answer(list(ids_P))
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        made = Generated(
            output_ids=list(sampled.ids),
            log_probs=[log_prob(token) for token in sampled.ids],
            versions=[self.version] * len(sampled.ids),
            finish_reason=sampled.finish_reason,
            matched=sampled.matched,
            server="http://scripted",
            prompt_ids=None if images is None or self.expand is None else self.expand(list(ids_P), images),
        )
        for count in range(1, len(sampled.ids)) if on_tokens is not None else ():
            assert on_tokens is not None
            on_tokens(Generated(output_ids=made.output_ids[:count], log_probs=made.log_probs[:count]))
        self.calls.append((tuple(ids_P), sampled.ids))
        return made

    async def ask(self, request: Any, *, timeout_s: float) -> Any:
        """What a server says of its model."""
        return {"has_image_understanding": self.expand is not None}

    async def close(self) -> None:
        """Nothing is open."""

    def close_departed(self) -> None:
        """Nothing is open."""


def log_prob(token: int) -> float:
    """A log-prob that tells the tokens apart."""
    return -0.001 * (token + 1)


def scripted(
    tokenizer: Any, answer: Callable[[list[int]], Sampled], *, model_path: str = "none", **settings: Any
) -> tuple[Sessions, ScriptedGenerator]:
    """Sessions whose model samples what ``answer`` says."""
    pool = ScriptedPool(vocab_size=len(tokenizer), model_path=model_path)
    model = ServedModel(pool, tokenizer, SessionSettings(**settings))  # type: ignore[arg-type]
    generator = ScriptedGenerator(answer)
    model.generator = generator  # type: ignore[assignment]
    return Sessions(model), generator


def says(tokenizer: Any, text: str, end: str | None, **sampled: Any) -> Sampled:
    """A sampled text, ended by a token."""
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()
    if end is None:
        return Sampled(ids, **{"finish_reason": "length", **sampled})
    last = tokenizer.convert_tokens_to_ids(end)
    return Sampled((*ids, last), matched=last)


def chat(session: Session, messages: Sequence[Mapping[str, Any]], on_progress: Any = None, **request: Any) -> Turn:
    """One turn."""
    return run(session.chat(ChatRequest(messages=tuple(messages), **request), on_progress))


def told_tokens(reports: Sequence[Progress]) -> tuple[int, ...]:
    """The tokens that reports have told of a choice."""
    return Progress.joined(reports).token_ids if reports else ()


_loop: list[asyncio.AbstractEventLoop] = []


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run in the one event loop of these tests."""
    if not _loop:
        _loop.append(asyncio.new_event_loop())
    return _loop[0].run_until_complete(work)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


# ------------------------------------------------------------------ a client's JSON round trip


def round_trip(message: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """The message as some client sends it back: the same, written otherwise."""
    made = json.loads(json.dumps(message))
    if rng.random() < 0.5:
        made.pop("reasoning_content", None)
    elif made.get("reasoning_content") and rng.random() < 0.3:
        made["content"] = f"<think>\n{made.pop('reasoning_content')}\n</think>\n\n{made['content'] or ''}"
    content = made.get("content")
    if made["role"] == "assistant" and not content:
        made["content"] = rng.choice([None, "", []])
    elif made["role"] == "assistant" and rng.random() < 0.3:
        made["content"] = content.strip()
    elif rng.random() < 0.3:
        cut = rng.randrange(len(content) + 1)
        made["content"] = [{"type": "text", "text": part} for part in (content[:cut], content[cut:])]
    drop_ids = rng.random() < 0.3
    for call in made.get("tool_calls") or ():
        arguments = json.loads(call["function"]["arguments"])
        if isinstance(arguments, dict) and rng.random() < 0.7:
            keys = rng.sample(sorted(arguments), len(arguments))
            call["function"]["arguments"] = json.dumps(
                {key: arguments[key] for key in keys}, indent=rng.choice([None, 2])
            )
        if drop_ids:
            call.pop("id")
        call["index"] = 0
    if rng.random() < 0.5:
        made.update(refusal=None, annotations=[], audio=None, function_call=None)
    return made


# ------------------------------------------------------------------ an agent


ACTIONS = st.lists(
    st.sampled_from(["ask", "ask", "ask", "edit", "back", "again", "choices", "retry", "compact", "sub-agent"]),
    min_size=1,
    max_size=6,
)


class Agent:
    """Does at random what agents do: asks, answers calls, edits, branches, samples, retries, forgets."""

    def __init__(self, session: Any, rng: random.Random, tools: list[Any], **sampling: Any) -> None:
        self.session, self.rng, self.tools, self.sampling = session, rng, tools, sampling
        self.messages: list[dict[str, Any]] = [user("dog")]
        self.kept: list[list[dict[str, Any]]] = []

    def act(self, action: str) -> None:
        rng = self.rng
        if action == "edit" and len(self.messages) > 1:
            at = rng.randrange(len(self.messages))
            self.messages = [*self.messages[:at], {**self.messages[at], "content": f"edited {rng.random()}"}]
            if self.messages[-1]["role"] != "user":
                self.messages.append(user("go on"))
        elif action == "back" and self.kept:
            self.messages = [*rng.choice(self.kept)]
        elif action == "compact":
            self.messages = [user(f"summary of {len(self.messages)} messages")]
        elif action == "sub-agent":
            self.ask([user("a sub-task"), {"role": "assistant", "content": "An example."}, user(f"do {rng.random()}")])
        self.kept.append([*self.messages])
        turn = self.ask(self.messages, retry=action == "retry", n=2 if action == "choices" else 1)
        chosen = dict(rng.choice(turn.choices).message)
        self.messages = [*self.messages, chosen]
        for call in chosen.get("tool_calls") or ():
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": "5"})
        if not chosen.get("tool_calls") or rng.random() < 0.3:
            self.messages.append(user(rng.choice(["and the dog?", "why?", ""])))

    def ask(self, messages: list[dict[str, Any]], *, retry: bool = False, n: int = 1) -> Turn:
        sent = [round_trip(message, self.rng) for message in messages]
        reports: list[Any] = []
        request = {"tools": tuple(self.tools), "sampling": {**self.sampling, "n": n}}
        turn = chat(self.session, sent, reports.append if self.rng.random() < 0.5 else None, **request)
        for choice in turn.choices if reports else ():
            of_choice = [report for report in reports if report.index == choice.index]
            if of_choice:
                whole = Progress.joined(of_choice)
                assert (choice.message["content"] or "").startswith(whole.content)
                assert (choice.message.get("reasoning_content") or "").startswith(whole.reasoning_content)
                assert choice.token_ids[: len(whole.token_ids)] == whole.token_ids
        if retry:
            leaves = len(self.session.trajectories())
            again = chat(self.session, sent, attempt=1, **request)
            assert again.is_repeated
            assert again.choices == turn.choices
            assert len(self.session.trajectories()) == leaves
        return turn


# ------------------------------------------------------------------ the check


def check_recorded(
    trajectories: Sequence[Trajectory], calls: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    """Trajectories hold exactly what was sampled, behind exactly what was sent for it.

    Args:
        trajectories: of all sessions.
        calls: per finished request the prompt's tokens and the sampled ones.
    """
    sampled = {(prompt, output) for prompt, output in calls}
    found: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for each in trajectories:
        length = len(each.token_ids)
        assert length == len(each.loss_mask) == len(each.log_probs) == len(each.weight_versions)
        at = 0
        while at < length:
            if not each.loss_mask[at]:
                assert each.log_probs[at] == 0.0
                assert each.weight_versions[at] == -1
                at += 1
                continue
            # Two answers can follow each other without a token between, and one can be another's beginning.
            outputs = [o for p, o in sampled if p == each.token_ids[:at] and o and _is_marked(each, at, o)]
            assert outputs, f"the tokens at {at} were not sampled behind those before them"
            output = max(outputs, key=len)
            found.add((each.token_ids[:at], output))
            at += len(output)
    assert found >= {call for call in sampled if call[1]}
    once = [(t.session, t.token_ids, json.dumps(t.messages)) for t in trajectories]
    assert len(set(once)) == len(once), "two trajectories of a session are the same"


def _is_marked(trajectory: Trajectory, start: int, output: tuple[int, ...]) -> bool:
    end = start + len(output)
    return trajectory.token_ids[start:end] == output and 0 not in trajectory.loss_mask[start:end]


def check_parents(trajectories: Sequence[Trajectory], sampled_tokens: int) -> None:
    """``parent`` and ``shared_tokens`` say what trajectories have in common; every sampled token counts once."""
    for index, each in enumerate(trajectories):
        if each.parent is None:
            assert each.shared_tokens == 0
        else:
            assert each.parent < index
            shared = trajectories[each.parent].token_ids[: each.shared_tokens]
            assert each.token_ids[: each.shared_tokens] == shared
    assert sum(sum(each.own_mask) for each in trajectories) == sampled_tokens
