"""The model inside what others wrap around one: torch.compile, data parallelism, PEFT."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers itself, where a wrapper that is known is around it."""
    while (inside := of_compile_or_parallel(model) or of_peft(model)) is not None:
        model = inside
    return model


def of_compile_or_parallel(model: nn.Module) -> nn.Module | None:
    """What torch.compile or data parallelism has wrapped, which must not get parameters and hooks any more."""
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return model.module
    return model._modules.get("_orig_mod")  # of torch.compile, whose class takes seconds to import


def of_peft(model: nn.Module) -> nn.Module | None:
    """What a PeftModel has wrapped."""
    of_theirs = type(model).__module__.split(".")[0] == "peft"
    return model.get_base_model() if of_theirs and hasattr(model, "get_base_model") else None
