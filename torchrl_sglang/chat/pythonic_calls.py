"""Tool calls written as Python: ``[name(argument=value), ...]`` (Llama 4, and Llama 3.2 when asked for it)."""

from __future__ import annotations

import ast
from typing import Any

from torchrl_sglang.chat.tool_json import JsonNumber

__all__ = ["read_pythonic"]

_LONGEST = 100_000


def read_pythonic(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of each call in a text that is nothing but a list of calls.

    The text is parsed, and never run. Values are literals, numbers keep their spelling.

    Raises:
        ValueError: the text is something else.

    Examples:
        >>> read_pythonic("[add(a=1, b=[2.50, None]), now()]")
        [('add', {'a': 1, 'b': [2.5, None]}), ('now', {})]
        >>> read_pythonic("[add(1)]")
        Traceback (most recent call last):
        ValueError: add has an argument without a name
    """
    body = text.strip()
    if len(body) > _LONGEST:
        raise ValueError("it is too long to be a list of calls")
    try:
        tree = ast.parse(body, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a list of calls ({error.__class__.__name__})") from None
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError("it is not a list of calls")
    return [_call(node, body) for node in tree.elts]


def _call(node: ast.expr, body: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, (ast.Name, ast.Attribute)):
        raise ValueError("it is not a list of calls")
    name = ast.unparse(node.func)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"{name} has an argument without a name")
    names = [keyword.arg for keyword in node.keywords]
    if len(set(names)) != len(names):
        raise ValueError(f"an argument of {name} is given twice")
    return name, {str(keyword.arg): _value(keyword.value, body) for keyword in node.keywords}


def _value(node: ast.expr, body: str) -> Any:
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (str, int))):
        return node.value
    if isinstance(node, ast.Constant) and isinstance(node.value, float):
        return JsonNumber(ast.get_source_segment(body, node) or repr(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = _value(node.operand, body)
        if isinstance(value, JsonNumber):
            return JsonNumber(f"-{value.text}")
        if isinstance(value, int) and not isinstance(value, bool):
            return -value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, body) for item in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        if all(isinstance(key, str) for key in keys) and len(set(keys)) == len(keys):
            return {str(key): _value(item, body) for key, item in zip(keys, node.values, strict=True)}
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    raise ValueError(f"{ast.unparse(node)[:40]!r} is no literal")
