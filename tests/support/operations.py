"""Counts what torch dispatches, and how often the host would wait for a device."""

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """count: operations, views left out (each of the others is a kernel, or several); waits: host synchronisations."""

    VIEWS = (
        "view",
        "select",
        "slice",
        "expand",
        "unsqueeze",
        "squeeze",
        "transpose",
        "t",
        "permute",
        "split",
        "unbind",
    )
    VIEWS = (*VIEWS, "detach", "alias", "split_with_sizes", "_unsafe_view", "promote_types", "device")
    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "equal")

    def __init__(self):
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.count += name not in self.VIEWS
        self.waits += name in self.WAITING
        return operation(*args, **(kwargs or {}))
