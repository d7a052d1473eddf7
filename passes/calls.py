"""Calls as text, both ways: `name(option=literal), name`. Pipelines and backends are written so. Nothing is ever evaluated."""

import ast
from dataclasses import fields, is_dataclass
from typing import Any

from ir.errors import OptionError

LONGEST = 100_000  # characters of text that are read: Python's parser is quick, but not on megabytes of brackets
EXAMPLE = 'write for example "untie, fold_norm, w4a16(group=32)"'


def parse_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The names and options of the calls that `text` lists.

    Raises:
        OptionError: malformed text, positional or repeated options, values that are not literals.
    """
    if len(text) > LONGEST:
        raise OptionError(f"pipeline text has at most {LONGEST} characters, not {len(text)}", where=text[:200])
    try:
        tree = ast.parse(f"[{text}\n]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise OptionError("malformed pipeline text", where=text[:200], remedy=EXAMPLE) from error
    if not isinstance(tree, ast.List):
        raise OptionError("malformed pipeline text", where=text[:200], remedy=EXAMPLE)
    return [_call(item, text[:200]) for item in tree.elts]


def _call(tree: ast.expr, where: str) -> tuple[str, dict[str, Any]]:
    """One name, or one call of a name with literal keyword arguments."""
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    if not isinstance(call.func, ast.Name):
        raise OptionError(f"{ast.unparse(tree)[:80]!r} is not a pass", where=where, remedy="write a name, or a call with literal options")
    name = call.func.id
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise OptionError(f"options of {name} are given by name", where=where, remedy=f"write {name}(option=value)")
    if len({keyword.arg for keyword in call.keywords}) < len(call.keywords):
        raise OptionError(f"an option of {name} is given twice", where=where)
    options = {}
    for keyword in call.keywords:
        try:
            options[str(keyword.arg)] = given = ast.literal_eval(keyword.value)
            repr(given)  # integers written in hexadecimal may be longer than what Python writes in decimal
        except (ValueError, TypeError, RecursionError) as error:
            raise OptionError(f"{name}({keyword.arg}=...) is not a literal", where=where) from error
    return name, options


def call_text(name: str, value: Any) -> str:
    """The call that makes a dataclass instance: its name, and the options that differ from their defaults."""
    if not is_dataclass(value):
        return name
    changed = [(f.name, getattr(value, f.name)) for f in fields(value) if f.init and getattr(value, f.name) != f.default]
    return name + (f"({', '.join(f'{option}={given!r}' for option, given in changed)})" if changed else "")


def fits(value: object, default: object) -> bool:
    """Whether a literal can stand where an option has this default; where that is None or another object, the pass has to say."""
    accepted = {bool: (bool,), int: (int,), float: (int, float), str: (str,), tuple: (tuple, list)}.get(type(default))
    return accepted is None or (isinstance(value, accepted) and (not isinstance(value, bool) or bool in accepted))
