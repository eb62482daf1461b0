"""A GPU that is not there: modes under which fake CUDA tensors work on a CPU build of torch and never meet the host."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostSync(TorchDispatchMode):
    """Rejects ops whose result on the host, or whose shape, depends on values on the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "equal")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        assert name not in self.WAITING, f"{op} waits for the device"
        result = op(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            assert source.device.type == "cpu" or result.device.type != "cpu", f"{op} copies to the host"
        return result


class WithoutDevice(TorchFunctionMode):
    """Some Python methods of tensors switch to their device, which a CPU build cannot: call the op underneath."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.__getitem__:
            return self.index(*args)
        if function is Tensor.__setitem__:
            part, value = self.index(*args[:2], view=True), args[2]
            return part.copy_(value) if isinstance(value, Tensor) else part.fill_(value)
        if function is Tensor.__invert__:
            return torch.bitwise_not(*args)
        if function in (Tensor.nonzero, Tensor.contiguous):
            return getattr(torch.ops.aten, function.__name__)(*args, **kwargs)
        if function is Tensor.to and not isinstance(args[1] if len(args) > 1 else None, Tensor):
            return self.to(*args, **kwargs)
        return function(*args, **kwargs)

    @staticmethod
    def to(x: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        options = {"device": device or x.device, "dtype": dtype or x.dtype, "memory_format": memory_format}
        if not copy and (options["device"].type, options["dtype"]) == (x.device.type, x.dtype) and not memory_format:
            return x
        return torch.ops.aten._to_copy(x, non_blocking=non_blocking, **options)

    @staticmethod
    def index(x: Tensor, key, view: bool = False) -> Tensor:
        key = key if isinstance(key, tuple) else (key,)
        named = sum(part is not None and part is not Ellipsis for part in key)
        key = key if any(part is Ellipsis for part in key) else (*key, Ellipsis)
        rank, dim, gathered = x.ndim, 0, {}
        for part in key:
            if part is Ellipsis:
                dim += rank - named
            elif part is None:
                x, dim = x.unsqueeze(dim), dim + 1
            elif isinstance(part, slice):
                x, dim = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1), dim + 1
            elif isinstance(part, Tensor):
                assert part.dtype not in (torch.bool, torch.uint8), "boolean indexing waits for the device"
                gathered[dim], dim = part, dim + 1
            elif isinstance(part, int):
                x = x.select(dim, part)
            else:
                raise AssertionError(f"indexing by {type(part).__name__} copies it to the device")
        if not gathered:
            return x
        assert not view, "writing through an index tensor: use scatter_ or index_put_"
        return torch.ops.aten.index(x, [gathered.get(d) for d in range(max(gathered) + 1)])
