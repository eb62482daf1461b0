"""Changing what one model calls so that no other model notices: a function's globals, a model's loss function."""

from types import FunctionType


def rebind(function, **names):
    """A copy of ``function`` for which each global name means the given value; RuntimeError where it uses no such."""
    if missing := set(names) - set(function.__code__.co_names):
        raise RuntimeError(f"{function.__module__}.{function.__qualname__} does not use {', '.join(sorted(missing))}")
    copy = FunctionType(
        function.__code__.replace(),  # its own: torch.compile keeps what it makes of a function with the code object
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def set_loss_function(model, loss) -> None:
    """Make ``loss`` the model's loss function, leaving no trace where it is the one transformers would take anyway.

    TypeError for a module that is no model of transformers, but hands on the attributes of one.
    """
    if not isinstance(getattr(type(model), "loss_function", None), property):
        raise TypeError(
            f"{type(model).__name__} is wrapped around a model of transformers: give the model inside it to dndetr"
        )
    model.loss_function = loss  # a property, which keeps it as _loss_function
    kept = model.__dict__.pop("_loss_function")
    if getattr(model, "loss_type", None) is None or model.loss_function is not kept:
        model.loss_function = kept
