"""Prompts that are texts or token ids, without a chat template."""

from __future__ import annotations

from array import array

from torchrl_sglang.agents.conversation.continuation import Prompt
from torchrl_sglang.agents.conversation.template import AgentTemplate
from torchrl_sglang.agents.conversation.tree import Node, Tree
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.text_tokens import encode_texts

__all__ = ["build_text_prompt"]


def build_text_prompt(prompt: str | tuple[int, ...], tree: Tree, template: AgentTemplate) -> Prompt:
    """The prompt for a continuation. Where it begins with an earlier prompt and its answer, their tokens are kept.

    An answer that an end token or a stop string ended is no beginning of a text: its tokens have what its text has not.

    Args:
        prompt: the text, or token ids.
        tree: what the session has recorded of texts.
        template: whose tokenizer encodes.

    Raises:
        ConfigError: the prompt is empty.
    """
    if not prompt:
        raise ConfigError("the prompt is empty: give a text, or at least one token id")
    if not isinstance(prompt, str):
        return _build_ids_prompt(list(prompt), tree, template)
    best, end = None, 0
    ends: dict[Node | None, int] = {None: 0}  # of the texts that the prompt begins with; a base comes before its nodes
    for node in tree.nodes:
        text = node.prompt_text + node.answer.content
        start = ends.get(node.base)
        if start is None or not prompt.startswith(text, start):
            continue
        ends[node] = start + len(text)
        if _is_open(node, template) and ends[node] >= end:
            best, end = node, ends[node]
    if best is None:
        (ids,) = encode_texts(template.tokenizer, [prompt], open_end=True)
        return Prompt(base=None, ids=array("q", ids), text=prompt)
    rest = prompt[end:]
    ids = template.renderer((), {}).encode_after(prompt[max(0, end - 32) : end], rest)
    return Prompt(base=best, ids=array("q", ids), text=rest)


def _build_ids_prompt(ids: list[int], tree: Tree, template: AgentTemplate) -> Prompt:
    best, count = None, 0
    given = array("q", ids)
    ends: dict[Node | None, int] = {None: 0}
    for node in tree.nodes:
        start = ends.get(node.base)
        known = node.prompt_ids + node.output_ids
        if start is None or given[start : start + len(known)] != known:
            continue
        ends[node] = start + len(known)
        if ends[node] >= count:
            best, count = node, ends[node]
    return Prompt(base=best, ids=given[count:], text=template.decode(ids[count:]))


def _is_open(node: Node, template: AgentTemplate) -> bool:
    """Whether a node's tokens have the node's text and nothing else."""
    return not node.beyond and not (node.output_ids and node.output_ids[-1] in template.special)
