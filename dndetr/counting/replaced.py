"""Attributes that are others for a while."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def replaced(target: object, name: str, value: object) -> Iterator[None]:
    """Within, ``target.name`` is ``value``."""
    own = name in vars(target)
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before) if own else delattr(target, name)
