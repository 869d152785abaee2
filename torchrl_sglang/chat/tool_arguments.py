"""Arguments of a tool call in the types that the tool's JSON schema asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from torchrl_sglang.chat.tool_json import JsonNumber, plain, read_json, spelling

__all__ = ["Untyped", "fit_arguments"]

_MAX_DEPTH = 64


class Untyped(str):
    """A value that the model wrote as text without quotation marks, so that its type is open."""

    __slots__ = ()


class _Misfit(Exception):
    """A value that no loss-free conversion brings into the schema's form."""


def fit_arguments(
    arguments: Mapping[str, Any], schema: Mapping[str, Any] | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Convert arguments to the types of a schema, where that loses nothing.

    ``"5"`` becomes 5 where an integer is expected and ``5`` becomes ``"5"`` where a string is; ``"[1, 2]"`` becomes a
    list; numbers keep their spelling. What has no single meaning stays as the model wrote it, and is reported.

    Args:
        arguments: as :func:`~torchrl_sglang.chat.tool_json.read_json` returns them, or :class:`Untyped` text.
        schema: the tool's ``parameters``; ``None`` checks nothing.

    Returns:
        The arguments, and one sentence for each that doesn't fit.

    Examples:
        >>> schema = {"properties": {"n": {"type": "integer"}, "name": {"type": "string"}}, "required": ["n"]}
        >>> fit_arguments({"n": "5", "name": 7}, schema)
        ({'n': 5, 'name': '7'}, ())
        >>> fit_arguments({"n": "five"}, schema)
        ({'n': 'five'}, ("n: 'five' is not an integer",))
    """
    root = schema if isinstance(schema, Mapping) else {}
    fitting = _Fitting(root)
    fitted, problems = fitting.members(dict(arguments), root, depth=0)
    return {name: plain(value) for name, value in fitted.items()}, tuple(problems)


@dataclass(frozen=True, slots=True)
class _Fitting:
    """Fits values to parts of one schema, whose references start at ``root``."""

    root: Mapping[str, Any]

    def members(
        self, values: dict[str, Any], schema: Mapping[str, Any], depth: int
    ) -> tuple[dict[str, Any], list[str]]:
        schema = self.resolve(schema)
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        more = schema.get("additionalProperties", True)
        fitted, problems = {}, []
        for name, value in values.items():
            part = properties.get(name, more if isinstance(more, Mapping) else {})
            if name not in properties and more is False:
                problems.append(f"{name}: there is no such argument")
            try:
                fitted[name] = self.fit(value, part, depth + 1)
            except _Misfit as misfit:
                fitted[name] = _unquoted(value)
                problems.append(f"{name}: {misfit}")
        required = schema.get("required")
        missing = [name for name in required if name not in values] if isinstance(required, list) else []
        return fitted, problems + [f"{name}: is required and missing" for name in missing]

    def fit(self, value: Any, schema: Any, depth: int) -> Any:
        """The value in the schema's form.

        Raises:
            _Misfit: it has no such form, or several.
        """
        if depth > _MAX_DEPTH:
            raise _Misfit("is nested too deeply")
        schema = self.resolve(schema)
        for choice in ("anyOf", "oneOf"):
            options = schema.get(choice)
            if isinstance(options, list) and options:
                base = {name: part for name, part in schema.items() if name != choice}
                return self.fit_one_of(value, [{**base, **self.resolve(option)} for option in options], depth)
        types = schema.get("type")
        if isinstance(types, list) or (schema.get("nullable") and isinstance(types, str) and types != "null"):
            names = [*types] if isinstance(types, list) else [types, "null"]
            base = {name: part for name, part in schema.items() if name != "nullable"}
            return self.fit_one_of(value, [{**base, "type": name} for name in names], depth)
        for part in schema.get("allOf") or ():
            value = self.fit(value, part, depth + 1)
        if types in _CONVERT:
            value = _CONVERT[types](value)
        elif isinstance(value, Untyped):
            value = _guess_nothing(value) if "enum" not in schema and "const" not in schema else value
        return self.fit_inside(_one_of_enum(value, schema), schema, depth)

    def fit_inside(self, value: Any, schema: Mapping[str, Any], depth: int) -> Any:
        if isinstance(value, dict):
            fitted, problems = self.members(value, schema, depth)
            if problems:
                raise _Misfit("; ".join(problems))
            return fitted
        if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
            return [self.fit(item, schema["items"], depth + 1) for item in value]
        return value

    def fit_one_of(self, value: Any, options: list[Mapping[str, Any]], depth: int) -> Any:
        """The value itself if one option takes it as it is, else the only form that the options give it."""
        forms: list[Any] = []
        reasons: list[str] = []
        for option in options:
            try:
                form = self.fit(value, option, depth + 1)
            except _Misfit as misfit:
                reasons.append(str(misfit))
                continue
            if _same(form, value) and not isinstance(value, Untyped):
                return form
            if not any(_same(form, other) for other in forms):
                forms.append(form)
        if isinstance(value, Untyped) and len(forms) > 1:
            # Text without quotation marks is text only where it is nothing else.
            forms = [form for form in forms if not isinstance(form, str)]
        if len(forms) == 1:
            return forms[0]
        if forms:
            raise _Misfit(f"{_shown(value)} could be {' or '.join(_shown(form) for form in forms)}")
        raise _Misfit(" and ".join(dict.fromkeys(reasons)) or f"{_shown(value)} fits nothing")

    def resolve(self, schema: Any) -> Mapping[str, Any]:
        """The part that a reference inside the tool's schema names; anything unreadable allows all."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, Mapping):
                return {}
            reference = schema.get("$ref")
            if not isinstance(reference, str) or not reference.startswith("#"):
                return schema
            part: Any = self.root
            for name in reference.removeprefix("#").split("/")[1:]:
                part = part.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(part, Mapping) else None
            schema = part
        return {}


def _to_string(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (bool, int, float)):
        return spelling(value)
    raise _Misfit(f"{_shown(value)} is not a string")


def _to_integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _decimal(value, "an integer")
    if number != number.to_integral_value() or abs(number.adjusted()) > 400:
        raise _Misfit(f"{_shown(value)} is not an integer")
    return int(number)


def _to_number(value: Any) -> int | float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    _decimal(value, "a number")
    try:
        number = read_json(value)
    except ValueError:
        raise _Misfit(f"{_shown(value)} is not a number") from None
    return number if isinstance(number, int) else float(number)


def _decimal(value: Any, what: str) -> Decimal:
    """The exact value of a JSON number, or of a string that holds one."""
    text = value.text if isinstance(value, JsonNumber) else value
    try:
        if not isinstance(text, (str, float)) or isinstance(read_json(str(text)), (bool, str, list, dict, type(None))):
            raise ValueError
        return Decimal(str(text).strip())
    except (ValueError, InvalidOperation):
        raise _Misfit(f"{_shown(value)} is not {what}") from None


def _to_boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip() in _TRUTH:
        return _TRUTH[value.strip()]
    raise _Misfit(f"{_shown(value)} is not true or false")


def _to_null(value: Any) -> None:
    if value is None or (isinstance(value, str) and value.strip() in ("null", "None")):
        return
    raise _Misfit(f"{_shown(value)} is not null")


def _to_container(kind: type, what: str) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = read_json(value)
            except ValueError as error:
                raise _Misfit(f"{_shown(value)} is not {what} ({error})") from None
        if not isinstance(value, kind):
            raise _Misfit(f"{_shown(value)} is not {what}")
        return value

    return convert


_TRUTH = {"true": True, "True": True, "false": False, "False": False}
_CONVERT: dict[Any, Callable[[Any], Any]] = {
    "string": _to_string,
    "integer": _to_integer,
    "number": _to_number,
    "boolean": _to_boolean,
    "null": _to_null,
    "array": _to_container(list, "a list"),
    "object": _to_container(dict, "an object"),
}


def _one_of_enum(value: Any, schema: Mapping[str, Any]) -> Any:
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(allowed, list) or any(_same(value, item) for item in allowed):
        return str(value) if isinstance(value, Untyped) else value
    spelled = value if isinstance(value, str) else spelling(value) if not isinstance(value, (dict, list)) else None
    meant = [item for item in allowed if (item if isinstance(item, str) else json.dumps(item)) == spelled]
    if len(meant) != 1:
        raise _Misfit(f"{_shown(value)} is none of {', '.join(_shown(item) for item in allowed)}")
    return meant[0]


def _guess_nothing(text: Untyped) -> Any:
    """A JSON value where the text is exactly how that value is written, else the text."""
    try:
        value = read_json(text)
    except ValueError:
        return str(text)
    if isinstance(value, (dict, list)) or json.dumps(plain(value)) == text.strip():
        return value
    return str(text)


def _unquoted(value: Any) -> Any:
    return str(value) if isinstance(value, Untyped) else value


def _same(a: Any, b: Any) -> bool:
    """Equal, and of the same JSON type: 1 is not true, and not ``"1"``."""
    if isinstance(a, bool) != isinstance(b, bool) or isinstance(a, str) != isinstance(b, str):
        return False
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return bool(a == b)


def _shown(value: Any) -> str:
    text = repr(str(value)) if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
