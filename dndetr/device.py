"""Where, in which arithmetic and how a model runs."""

import torch

from .ops import _backend


def pick_device(name: str | torch.device, local_rank: int | None = None) -> torch.device:
    """The device of that name, or that device; "auto" is the GPU where there is one.

    local_rank: number of this process among those that share the machine's GPUs, one each (None: alone). ValueError
    where the device does not exist.
    """
    found, name = torch.cuda.device_count(), str(name)
    if name in ("cpu", "cpu:0") or (name == "auto" and not found):
        return torch.device("cpu")
    if not found:
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no GPU here; use --device cpu")
    device = torch.device("cuda" if name == "auto" else name)
    if local_rank is None:
        if (device.index or 0) >= found:
            raise ValueError(f"--device {name}: there are {found} GPUs here, counted from cuda:0")
        return device
    if device.index is not None:
        raise ValueError(f"--device {name}: each of several processes takes its own GPU; use --device cuda")
    if local_rank >= found:
        raise ValueError(
            f"process {local_rank} has no GPU: there are {found} here; use --nproc-per-node {found} or less"
        )
    return torch.device("cuda", local_rank)


def make_current(device: torch.device) -> None:
    """Whatever is made without naming a GPU, such as page-locked memory and events, belongs to this one from now on."""
    if device.type == "cuda" and device.index is not None:  # without an index it is the current one
        torch.cuda.set_device(device)


def pick_precision(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of that name, or that dtype; "auto" is bfloat16 where the hardware multiplies in it, else float32."""
    if name != "auto":
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if (found := known.get(str(name).removeprefix("torch."))) is None:
            raise ValueError(f"precision {name}: give auto, {' or '.join(known)}")
        return found
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def pick_mode(name: str, device: torch.device, world: int) -> str:
    """How steps run, "eager" or "graph"; "auto" is graph on one GPU. ValueError where a graph cannot be had."""
    reason = None
    if device.type != "cuda":
        reason = f"the {device.type} has no CUDA graphs"
    elif world > 1:
        reason = "gradients that several processes exchange during backward are not captured"
    else:
        matcher, why = _backend.choose("match", None, "cuda")
        if matcher == "reference":
            reason = f"matching by the reference waits for the host ({why})"
    if name == "graph" and reason:
        raise ValueError(f"--mode graph: {reason}; use --mode eager")
    return "graph" if reason is None and name != "eager" else "eager"
