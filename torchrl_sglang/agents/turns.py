"""Generates and records one turn: prompt, choices, answers."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from array import array
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torchrl_sglang.agents.conversation.answers import decode_answer, finish_reason, read_answer
from torchrl_sglang.agents.conversation.continuation import Prompt, build_prompt
from torchrl_sglang.agents.conversation.messages import Message, read_messages
from torchrl_sglang.agents.conversation.progress import ProgressText
from torchrl_sglang.agents.conversation.same_calls import SameCalls
from torchrl_sglang.agents.conversation.texts import build_text_prompt
from torchrl_sglang.agents.conversation.tree import Match, Node, Tree
from torchrl_sglang.agents.generated import Generated
from torchrl_sglang.agents.image_tokens import PromptImages
from torchrl_sglang.agents.served_model import ServedModel
from torchrl_sglang.agents.sharing import TurnRecord
from torchrl_sglang.agents.stop_strings import cut_at_stop
from torchrl_sglang.agents.tool_choice import reads_calls
from torchrl_sglang.agents.turn_reports import reporter, top_log_probs
from torchrl_sglang.agents.types import ChatRequest, OnProgress, TextRequest
from torchrl_sglang.chat.quoted_text import open_thinking
from torchrl_sglang.chat.tool_schemas import read_tools
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError, RequestRejectedError
from torchrl_sglang.protocol.stop_strings import StopStrings

__all__ = ["count_chat", "sample_chat", "sample_text"]

_MOST_TOP_LOGPROBS = 100
_LONG_TEXT = 100_000
"""Characters that take some ten milliseconds to tokenize."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A turn to generate.

    Attributes:
        prompt: its prompt.
        ids_P: all tokens of it, as they are sent.
        sampling: how tokens are drawn, ``n`` choices.
        top_logprobs: number of the most likely tokens to report.
        tools: the tools whose calls are read from the answers; none for a text.
        is_chat: whether thinking is separated from the content.
        parallel: whether a message may have several calls.
        earlier_calls: number of calls in the conversation.
        images: the prompt's images.
        num_tokens: length of the prompt on the server, as far as it is known; ``None`` is that of ``ids_P``.
    """

    prompt: Prompt
    ids_P: array[int]
    sampling: SamplingParams
    top_logprobs: int
    tools: Sequence[Mapping[str, Any]] = ()
    is_chat: bool = True
    parallel: bool = True
    earlier_calls: int = 0
    images: PromptImages | None = None
    num_tokens: int | None = None


async def sample_chat(
    request: ChatRequest, model: ServedModel, tree: Tree, *, preferred: str | None, on_progress: OnProgress | None
) -> TurnRecord:
    """Generate the next message of a conversation, and record it.

    Args:
        request: the conversation.
        model: the served model.
        tree: what the session has recorded.
        preferred: URL of the server that generated the session's last turn.
        on_progress: called with what is generated.

    Raises:
        ConfigError: something in the request can't be honoured.
        ServerError: no server generated the answer.
    """
    match, tools, prompt = await _asked(request, model, tree)
    ids_P = prompt.token_ids()
    thinks = open_thinking(prompt.text)
    # A template that refuses several calls in a message could not write the answer into the next prompt.
    parallel = request.parallel_tool_calls is not False and model.template.takes_several_calls

    def sampling(length: int) -> SamplingParams:
        return model.constrained(
            request.sampling,
            length,
            tools=tools,
            tool_choice=request.tool_choice,
            parallel=parallel,
            thinking_end=None if thinks is None else thinks[1],
        )

    job = _Job(
        prompt=prompt,
        ids_P=ids_P,
        sampling=sampling(len(ids_P)),
        top_logprobs=request.top_logprobs,
        tools=tools if reads_calls(tools, request.tool_choice) else (),
        parallel=parallel,
        earlier_calls=sum(len(message.calls) for message in match.messages),
        images=model.images.of_prompt(prompt, ids_P),
    )
    if job.images is not None:
        length = await _length_with_images(job, job.images, model, preferred)
        job = replace(job, sampling=sampling(length), num_tokens=length)
    make = _maker(model, job, parent=match.node, new=match.new, position=len(match.messages))
    return await _run(job, model, tree, make, preferred, on_progress)


async def count_chat(request: ChatRequest, model: ServedModel, tree: Tree) -> int:
    """Number of tokens of the prompt of a conversation. Arguments and errors as :func:`sample_chat`."""
    _, _, prompt = await _asked(request, model, tree)
    return len(prompt.token_ids())


async def _asked(request: ChatRequest, model: ServedModel, tree: Tree) -> tuple[Match, list[dict[str, Any]], Prompt]:
    """The conversation as far as it is known, its tools, and its prompt."""
    tools = read_tools(list(request.tools)) if request.tools else []
    calls = SameCalls(
        schemas={tool["function"]["name"]: tool["function"].get("parameters") for tool in tools},
        by_id=model.settings.on_rewrite == "keep",
    )
    match = tree.match(await model.images.checked(read_messages(request.messages)), calls)
    variables = model.template_variables(request.template_kwargs)
    build = partial(
        build_prompt,
        match,
        model.template,
        tools=tools,
        variables=variables,
        on_rewrite=model.settings.on_rewrite,
    )
    return match, tools, await _built(sum(len(message.content) for message in match.messages), build)


async def sample_text(
    request: TextRequest, model: ServedModel, tree: Tree, *, preferred: str | None, on_progress: OnProgress | None
) -> TurnRecord:
    """Generate the continuation of a text or of tokens, and record it. Arguments and errors as :func:`sample_chat`."""
    if request.prompt and not isinstance(request.prompt, str):  # an id that is no token's can't be decoded
        model.check(request.prompt, model.sampling(request.sampling, len(request.prompt)))
    prompt = await _built(len(request.prompt), partial(build_text_prompt, request.prompt, tree, model.template))
    ids_P = prompt.token_ids()
    job = _Job(
        prompt=prompt,
        ids_P=ids_P,
        sampling=model.sampling(request.sampling, len(ids_P)),
        top_logprobs=request.top_logprobs,
        is_chat=False,
    )
    asked = Message(role="user", content=prompt.text)
    position = 1 if prompt.base is None else prompt.base.position + 2
    make = _maker(model, job, parent=prompt.base, new=(asked,), position=position)
    return await _run(job, model, tree, make, preferred, on_progress)


async def _built(length: int, build: Callable[[], Prompt]) -> Prompt:
    """The prompt of a text of this length. A long one is tokenized in a thread: other agents are served meanwhile."""
    return build() if length < _LONG_TEXT else await asyncio.to_thread(build)


MakeNode = Callable[[Generated, str, int], Coroutine[Any, Any, Node]]


def _maker(model: ServedModel, job: _Job, *, parent: Node | None, new: tuple[Message, ...], position: int) -> MakeNode:
    """The function that makes a node of a sequence, for the turn and the choice that it names."""

    async def make(made: Generated, turn: str, index: int) -> Node:
        written = decode_answer(
            made.output_ids, finish_reason=made.finish_reason, matched=made.matched, template=model.template
        )
        if job.sampling.no_stop_trim and isinstance(made.matched, str):
            written = replace(written, text=written.text + written.beyond, beyond="")
        prompt_text = job.prompt.text
        found = None
        if job.tools:
            is_cut = made.finish_reason == "length"
            found = await model.find_calls(written.text, job.tools, prompt_text=prompt_text, is_cut=is_cut)
        answer = Message(role="assistant", content=model.template.without_marks(written.text), raw=written.text)
        if job.is_chat:
            answer = read_answer(
                written,
                found,
                prompt_text=prompt_text,
                prompt_ids=hashlib.sha256(job.ids_P).digest() if found is not None and found.calls else (),
                output_ids=made.output_ids,
                template=model.template,
                parser=model.parser,
                earlier_calls=job.earlier_calls,
                most_calls=None if job.parallel else 1,
            )
        return Node(
            turn=turn,
            index=index,
            parent=parent,
            **_prompt_fields(job, made),
            new=new,
            answer=answer,
            prompt_text=prompt_text,
            text=written.text,
            beyond=written.beyond,
            output_ids=array("q", made.output_ids),
            log_probs=array("d", made.log_probs),
            versions=array("q", made.versions),
            finish_reason=finish_reason(made.finish_reason, answer),
            position=position,
            temperature=0.0 if job.sampling.is_greedy else job.sampling.temperature,
            exact_log_probs=not job.sampling.truncates,
            stop=made.matched if isinstance(made.matched, str) else None,
            top_log_probs=top_log_probs(made.top_log_probs, model.template),
        )

    return make


async def _run(
    job: _Job,
    model: ServedModel,
    tree: Tree,
    make: MakeNode,
    preferred: str | None,
    on_progress: OnProgress | None,
) -> TurnRecord:
    """Generate all choices side by side, and record them together: a turn that fails leaves nothing."""
    if not 0 <= job.top_logprobs <= _MOST_TOP_LOGPROBS:
        raise ConfigError(f"top_logprobs must be between 0 and {_MOST_TOP_LOGPROBS}, got {job.top_logprobs}")
    model.check(job.ids_P, job.sampling, num_tokens=job.num_tokens, new=job.prompt.ids)
    single = job.sampling if job.sampling.n == 1 else replace(job.sampling, n=1)
    seed = job.sampling.sampling_seed
    stops = StopStrings.of(job.sampling, model.template.decode)

    async def one(index: int) -> Generated:
        report = (
            None
            if on_progress is None
            else reporter(
                index,
                ProgressText(
                    model.template,
                    stops=job.sampling.stop,
                    has_tools=bool(job.tools),
                    reads_here=model.reads_calls_here,
                    thinks=open_thinking(job.prompt.text) if job.is_chat else None,
                    is_chat=job.is_chat,
                    holds_all=bool(job.sampling.stop_regex),
                ),
                stops,
                on_progress,
                model.template,
            )
        )
        made = await model.generator.generate(
            job.ids_P,
            single if seed is None else replace(single, sampling_seed=seed + index),
            top_logprobs=job.top_logprobs,
            preferred=preferred,
            timeout_s=model.settings.turn_timeout_s,
            stops=stops,
            on_tokens=report,
            **_images(job),
        )
        return cut_at_stop(made, stops)

    with _refused_images() if job.images is not None else nullcontext():
        made = await _all_or_none([one(index) for index in range(job.sampling.n)])
    turn = f"turn_{secrets.token_hex(8)}"
    nodes = [await make(each, turn, index) for index, each in enumerate(made)]
    await asyncio.sleep(0)  # whoever ends the turn at this moment does so before it is recorded
    return TurnRecord(
        id=turn,
        nodes=[_recorded(tree, node) for node in nodes],
        prompt_tokens=len(made[0].prompt_ids or job.ids_P),
        cached_tokens=max(each.cached_tokens for each in made),
        server=made[0].server,
    )


def _images(job: _Job) -> dict[str, Any]:
    return {} if job.images is None else {"images": job.images}


def _prompt_fields(job: _Job, made: Generated) -> dict[str, Any]:
    """The prompt's part of a node, as the server saw it.

    A server that tokenized the conversation's beginning otherwise than it was recorded begins a new trajectory.
    """
    prompt, seen = job.prompt, made.prompt_ids
    if job.images is None or seen is None:
        return {"base": prompt.base, "prompt_ids": prompt.ids}
    known = job.images.known_ids
    if tuple(seen[: len(known)]) != known:
        return {
            "base": None,
            "prompt_ids": array("q", seen),
            "sent_ids": job.ids_P,
            "images": job.images.urls,
        }
    return {
        "base": prompt.base,
        "prompt_ids": array("q", seen[len(known) :]),
        "sent_ids": prompt.ids,
        "images": prompt.images,
    }


async def _length_with_images(job: _Job, images: PromptImages, model: ServedModel, preferred: str | None) -> int:
    """Length of the prompt on the server; asked for if the answer may fill the context and images are new."""
    context = model.pool.context_length
    known = len(job.ids_P) + len(images.known_ids) - images.num_known_sent
    if not job.prompt.images or context is None or known + job.sampling.max_new_tokens < context:
        return known
    model.check(job.ids_P, replace(job.sampling, max_new_tokens=1), num_tokens=known)
    one_token = SamplingParams(max_new_tokens=1, temperature=0.0)
    with _refused_images():
        made = await model.generator.generate(job.ids_P, one_token, preferred=preferred, images=images)
    return len(made.prompt_ids or job.ids_P)


@contextmanager
def _refused_images() -> Iterator[None]:
    """What a server says against the images of a prompt, it says to the client."""
    try:
        yield
    except RequestRejectedError as error:
        if not 400 <= error.status < 500:
            raise
        raise ConfigError(f"the server refused the prompt with its images: {error.detail or error}") from error


def _recorded(tree: Tree, node: Node) -> Node:
    """Record an answer. Tokens that the tree has already stay as they are, and the client gets its own answer.

    Under other settings the same tokens may be text instead of a call, or end at a stop string.
    """
    known = tree.add(node)
    node.children = known.children
    return node


async def _all_or_none(work: Sequence[Coroutine[Any, Any, Generated]]) -> list[Generated]:
    """The results of all; if one fails, or this is cancelled, the others are cancelled."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
