"""Settings as Python gives them: names and values of any depth, checked, put into a configuration."""

import contextlib
import difflib
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from .config import Config

_NOT_SETTINGS = ("given",)
_WANTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a string", types.NoneType: "None"}


def flat(settings: Mapping[str, Any], kind: type = Config, prefix: str = "") -> dict[str, Any]:
    """Settings in groups, as dicts, dataclasses or with dots -> the same by whole names, such as denoising.groups.

    kind: the dataclass that they are settings of. ValueError for names that do not exist or come twice, and for values
    that are not of their type.
    """
    found: dict[str, Any] = {}
    known = _types(kind)
    for key, value in settings.items():
        name, dot, rest = str(key).partition(".")
        group = is_dataclass(known.get(name))
        if name not in known or (dot and not group):
            raise ValueError(_unknown(f"{prefix}{key}", prefix, known))
        if group:
            members = _members({rest: value} if dot else value, known[name], prefix + name)
            new = flat(members, known[name], f"{prefix}{name}.")
        else:
            new = {prefix + name: _checked(value, known[name], prefix + name)}
        if twice := found.keys() & new.keys():
            raise ValueError(f"{min(twice)} is given twice: leave out one of them")
        found |= new
    return found


def changed(config: Any, settings: Mapping[str, Any]) -> Any:
    """A configuration with settings, by their whole names, put in the place of its own; it checks what they are."""
    own: dict[str, Any] = {}
    groups: dict[str, dict] = {}
    for name, value in settings.items():
        group, dot, rest = name.partition(".")
        if dot:
            groups.setdefault(group, {})[rest] = value
        else:
            own[name] = value
    return replace(config, **own, **{name: changed(getattr(config, name), each) for name, each in groups.items()})


def in_python(text: str) -> str:
    """A sentence about flags as one about settings in Python; commands in it stay."""
    names: dict[str, str] = {}
    for name, hint in _names(Config):
        group, dot, last = name.replace("_", "-").rpartition(".")
        switch = hint is bool
        names |= {
            f"--{group}{dot}{last}": f"{name}=True" if switch else name,
            f"--{group}{dot}no-{last}": f"{name}=False",
        }
    return re.sub(
        r"python -m dndetr[^;,:)]*|(?<![\w-])--[a-z][\w.-]*\w",
        lambda found: names.get(found.group(), found.group()),
        text,
    )


def _types(kind: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if name not in _NOT_SETTINGS}


def _names(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings by their whole names, with their types."""
    for name, hint in _types(kind).items():
        if is_dataclass(hint):
            yield from _names(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _unknown(name: str, prefix: str, beside: Mapping[str, Any]) -> str:
    """What to say of a setting that does not exist: which may be meant, and which there are."""
    every = [known for known, _ in _names(Config)]
    meant = [known for known in every if known.rpartition(".")[2] == name.rpartition(".")[2]]
    meant = meant or difflib.get_close_matches(name, every, n=1)
    question = f": did you mean {' or '.join(meant)}?" if meant else ""
    place = f"in {prefix.removesuffix('.')} there are" if prefix else "there are"
    return f"there is no setting {name}{question} ({place} {', '.join(beside)})"


def _members(value: Any, kind: type, name: str) -> Mapping[str, Any]:
    """A group's settings by their names; of a dataclass, all it has."""
    if isinstance(value, kind):
        return {field.name: getattr(value, field.name) for field in fields(kind)}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} {value!r}: give a dict of its settings, or a {kind.__name__}")
    return value


def _checked(value: Any, hint: Any, name: str) -> Any:
    try:
        return _fitted(value, hint)
    except _Unfit:
        raise ValueError(f"{name} {value!r}: give {_wanted(hint)}") from None


class _Unfit(Exception):
    """A value is not of the type that is asked for."""


def _fitted(value: Any, hint: Any) -> Any:
    """The value as its type has it, so that equal settings are kept alike: 1 as 1.0, lists as tuples, paths as text."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for part in parts:
            with contextlib.suppress(_Unfit):
                return _fitted(value, part)
    elif origin is Literal:
        for part in parts:
            with contextlib.suppress(_Unfit):
                if _fitted(value, type(part)) == part:
                    return part
    elif origin is tuple:
        if isinstance(value, str) and parts[-1] is Ellipsis:
            value = (value,)  # one text where several may be given
        if isinstance(value, Sequence) and not isinstance(value, str):
            kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
            if len(kinds) == len(value):
                return tuple(_fitted(each, kind) for each, kind in zip(value, kinds, strict=True))
    elif hint in (int, float):
        # True equals 1, and does not mean it.
        if isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                return hint(value)
    elif hint is bool and isinstance(value, np.bool_):
        return bool(value)
    elif hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif isinstance(value, hint):
        return value
    raise _Unfit


def _wanted(hint: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_wanted, parts))
    if origin is Literal:
        return f"{'one of ' * (len(parts) > 1)}{', '.join(map(repr, parts))}"
    if origin is tuple:
        return f"a list, each {_wanted(parts[0])}" if parts[-1] is Ellipsis else f"({', '.join(map(_wanted, parts))})"
    return _WANTED[hint]
