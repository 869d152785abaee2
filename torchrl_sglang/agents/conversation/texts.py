"""Prompts that are texts or token ids, without a chat template."""

from __future__ import annotations

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
    best, said = None, ""
    for node in tree.nodes:
        text = "".join(each.prompt_text + each.answer.content for each in node.chain())
        if _is_open(node, template) and prompt.startswith(text) and len(text) >= len(said):
            best, said = node, text
    if best is None:
        (ids,) = encode_texts(template.tokenizer, [prompt], open_end=True)
        return Prompt(base=None, ids=ids, text=prompt)
    rest = prompt[len(said) :]
    return Prompt(base=best, ids=template.renderer((), {}).encode_after(said[-32:], rest), text=rest)


def _build_ids_prompt(ids: list[int], tree: Tree, template: AgentTemplate) -> Prompt:
    best, count = None, 0
    for node in tree.nodes:
        known = node.token_ids()
        if len(known) >= count and ids[: len(known)] == known:
            best, count = node, len(known)
    return Prompt(base=best, ids=ids[count:], text=template.decode(ids[count:]))


def _is_open(node: Node, template: AgentTemplate) -> bool:
    """Whether a node's tokens have the node's text and nothing else."""
    return not node.beyond and not (node.output_ids and node.output_ids[-1] in template.special)
