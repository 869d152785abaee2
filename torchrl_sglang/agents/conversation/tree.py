"""The tree of what a session sampled. Each node is one answer, with the prompt tokens that led to it.

Two relations connect nodes. ``parent`` is the answer before in the conversation. ``base`` is the answer whose tokens
this node's tokens continue; it is the parent, an earlier answer where the template writes the parent otherwise than it
was generated, or ``None`` where no answer's tokens are kept. Tokens of a node are those of its base, its prompt tokens
and its sampled tokens. A node that is no other's base is a leaf: one trajectory.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torchrl_sglang.agents.conversation.messages import Message, results_with_ids, same_answer
from torchrl_sglang.agents.conversation.same_calls import SameCalls
from torchrl_sglang.agents.types import FinishReason, TokenLogProb

__all__ = ["Match", "Node", "Tree"]

_PLAINLY = SameCalls()


@dataclass(slots=True, kw_only=True, eq=False)
class Node:
    """One answer.

    Attributes:
        turn: id of the turn in which it was sampled.
        index: its number among the turn's choices.
        parent: the answer before it in the conversation.
        base: the answer whose tokens its tokens continue.
        new: the messages between the parent's answer and this one.
        answer: the answer.
        prompt_text: the text that its prompt adds to the base's tokens; all of the prompt's without a base.
        prompt_ids: the tokens of this text, as the server saw them: each image has all its tokens.
        images: URLs of the images in them.
        sent_ids: the same as it was sent, with one placeholder per image; ``None`` if nothing was expanded.
        text: the answer as it was generated, without the token or string that ended it.
        beyond: text of sampled tokens behind ``text``: the stop string that ended it.
        output_ids: the sampled tokens.
        log_probs: natural-log probability of each of them.
        versions: the weights that generated each of them.
        finish_reason: why it ended.
        position: number of messages before the answer.
        temperature: the temperature at which its tokens were drawn; 0 is greedy.
        exact_log_probs: whether the log-probs are those of the distribution that the tokens were drawn from.
        stop: the stop string that ended it.
        top_log_probs: per token the most likely ones, if they were requested.
        children: the answers that follow it in conversations.
        is_base: whether another node's tokens continue its tokens.
    """

    turn: str
    index: int
    parent: Node | None
    base: Node | None
    new: tuple[Message, ...]
    answer: Message
    prompt_text: str
    prompt_ids: array[int]
    text: str
    beyond: str
    output_ids: array[int]
    log_probs: array[float]
    versions: array[int]
    finish_reason: FinishReason
    position: int
    temperature: float = 1.0
    exact_log_probs: bool = True
    stop: str | None = None
    top_log_probs: tuple[tuple[TokenLogProb, ...], ...] = ()
    children: list[Node] = field(default_factory=list)
    is_base: bool = False
    images: tuple[str, ...] = ()
    sent_ids: array[int] | None = None

    def path(self) -> list[Node]:
        """The answers of the conversation up to this one."""
        return list(_upwards(self, "parent"))[::-1]

    def chain(self) -> list[Node]:
        """The answers whose tokens this node's sequence has, this one included."""
        return list(_upwards(self, "base"))[::-1]

    def token_ids(self) -> array[int]:
        """All tokens of the sequence, up to the end of the answer."""
        ids = array("q")
        for node in self.chain():
            ids += node.prompt_ids
            ids += node.output_ids
        return ids

    def all_prompt_ids(self) -> list[int]:
        """All tokens before the answer."""
        return [*(() if self.base is None else self.base.token_ids()), *self.prompt_ids]

    def token_ids_to_send(self) -> array[int]:
        """The same as it is sent to a server, with one placeholder per image."""
        ids = array("q")
        for node in self.chain():
            ids += node.prompt_ids if node.sent_ids is None else node.sent_ids
            ids += node.output_ids
        return ids

    def num_tokens(self) -> int:
        """Length of :meth:`token_ids`."""
        return sum(len(node.prompt_ids) + len(node.output_ids) for node in self.chain())

    def messages(self) -> list[Message]:
        """The conversation up to and with the answer."""
        return [message for node in self.path() for message in (*node.new, node.answer)]


def _upwards(node: Node | None, relation: str) -> Iterator[Node]:
    while node is not None:
        yield node
        node = getattr(node, relation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What of a request's messages the session knows.

    Attributes:
        node: the last answer of the session's that the messages have; ``None`` if they have none.
        messages: all messages; what the session knows is as it has recorded it.
        new: the messages after the node's answer.
    """

    node: Node | None
    messages: tuple[Message, ...]
    new: tuple[Message, ...]


class Tree:
    """The answers of one session.

    Attributes:
        nodes: all of them, in the order in which they were recorded.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._numbers: dict[Node, int] = {}
        # Of thousands of branches those with the messages of a request are found without a look at the others.
        self._following: dict[tuple[Node | None, _Said], list[Node]] = {}
        self._lengths: dict[Node | None, dict[int, None]] = {}

    def leaves(self) -> list[Node]:
        """The ends of all token sequences, in the order in which they were recorded."""
        return [node for node in self.nodes if not node.is_base]

    def add(self, node: Node) -> Node:
        """Record an answer.

        Returns:
            The node; or an equal one that is there already: the same tokens, sampled with the same weights, are the
            same segment.
        """
        alike = self._following.setdefault((node.parent, _said(node.new)), [])
        for known in alike:
            same_prompt = known.base is node.base and known.prompt_ids == node.prompt_ids and known.new == node.new
            if same_prompt and known.output_ids == node.output_ids and known.versions == node.versions:
                return known
        alike.append(node)
        self._lengths.setdefault(node.parent, {})[len(node.new)] = None
        if node.parent is not None:
            node.parent.children.append(node)
        self._numbers[node] = len(self.nodes)
        self.nodes.append(node)
        if node.base is not None:
            node.base.is_base = True
        return node

    def match(self, messages: Sequence[Message], calls: SameCalls = _PLAINLY) -> Match:
        """Find the longest conversation of the session that the messages continue.

        Answers are compared by :func:`~.messages.same_answer`, all other messages must be equal. Ids of tool calls
        don't count, as long as the results answer the same calls.

        Args:
            messages: of a request.
            calls: how calls are compared.
        """
        best: tuple[Node | None, int, Mapping[str, str]] = (None, 0, {})
        waiting = [best]
        while waiting:
            node, end, names = waiting.pop()
            if end > best[1]:
                best = (node, end, names)
            children = self._candidates(node, messages, end)
            # Of answers that are alike the one whose ids the client has, or which it has changed least; of equal ones
            # that of the latest turn, and of its choices the first: it is what the client saw last.
            order = {turn: number for number, turn in enumerate(dict.fromkeys(child.turn for child in children))}
            same = [child for child in children if _continues(child, messages, end, names, calls)]
            if len(same) > 1:
                like = {child: _likeness(child, messages[end + len(child.new)]) for child in same}
                same.sort(key=lambda each: (like[each], order[each.turn], -each.index))
            for child in same:
                at = end + len(child.new)
                pairs = zip(messages[at].calls, child.answer.calls, strict=True)
                other = {c.id: k.id for c, k in pairs if c.id and names.get(c.id, c.id) != k.id}
                waiting.append((child, at + 1, {**names, **other} if other else names))
        node, end, names = best
        known = node.messages() if node is not None else []
        rest = tuple(_renamed(message, names) for message in messages[end:])
        if node is not None:
            rest = results_with_ids(node.answer, rest)
        return Match(node=node, messages=(*known, *rest), new=rest)

    def _candidates(self, node: Node | None, messages: Sequence[Message], start: int) -> list[Node]:
        """The answers behind a node before which the same was said as in the messages from ``start`` on."""
        found: list[Node] = []
        lengths = self._lengths.get(node, ())
        for length in lengths:
            found += self._following.get((node, _said(messages[start : start + length])), ())
        return found if len(lengths) < 2 else sorted(found, key=self._numbers.__getitem__)


_Said = tuple[tuple[str, str, str | None], ...]


def _said(messages: Sequence[Message]) -> _Said:
    """What messages must have in common to be the same. Answers that a client brought along are compared otherwise."""
    return tuple((each.role, each.name, None if each.role == "assistant" else each.content) for each in messages)


def _continues(
    child: Node, messages: Sequence[Message], start: int, names: Mapping[str, str], calls: SameCalls
) -> bool:
    """Whether the messages from ``start`` on begin with those before an answer, and the answer."""
    at = start + len(child.new)
    trimmed = child.stop if child.beyond else None
    if at >= len(messages) or not any(same_answer(m, child.answer, calls) for m in _as_sent(messages[at], trimmed)):
        return False
    return all(_is_same(m, known, names) for m, known in zip(messages[start:at], child.new, strict=True))


def _likeness(child: Node, message: Message) -> tuple[bool, bool, bool]:
    """How much a client's message is like an answer that it continues; ids say most."""
    answer = child.answer
    return (
        bool(answer.calls) and [call.id for call in message.calls] == [call.id for call in answer.calls],
        [call.key for call in message.calls] == [call.key for call in answer.calls],
        message.content == answer.content,
    )


def _as_sent(message: Message, stop: str | None) -> Iterator[Message]:
    """The message, and what it was before the client put back the stop string that ended it."""
    yield message
    content = message.content.rstrip()
    if stop and stop.strip() and content.endswith(stop.rstrip()):
        yield replace(message, content=content[: -len(stop.rstrip())])


def _renamed(message: Message, names: Mapping[str, str]) -> Message:
    """The message with the ids that the session gave to the calls."""
    return replace(message, call_id=names[message.call_id]) if message.call_id in names else message


def _is_same(client: Message, known: Message, names: Mapping[str, str]) -> bool:
    if (client.role, client.name) != (known.role, known.name):
        return False
    if client.role == "assistant":  # one that the client brought along, such as an example
        return same_answer(client, known)
    same_call = not client.call_id or names.get(client.call_id, client.call_id) == known.call_id
    same_content = (client.content, client.images) == (known.content, known.images)
    return same_content and same_call
