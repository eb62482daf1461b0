"""Weights of a DINO of ours under the names of detrex, each made from its parts, one by one."""

_ENCODER = {"self_attn": "attentions.0", "norm1": "norms.0", "ffn.norm": "norms.1"}
_DECODER = {"self_attn": "attentions.0.attn", "norm2": "norms.0", "cross_attn": "attentions.1", "norm1": "norms.1"}
_DECODER["ffn.norm"] = "norms.2"
_FFN = {"ffn.linear1": "ffns.0.layers.0.0", "ffn.linear2": "ffns.0.layers.1"}


def detrex(model) -> dict:
    """The state dictionary that detrex would have saved: heads of every layer, the encoder's last; no "no label"."""
    state, layers, maps = {}, len(model.decoder.layers), len(model.backbone.widths)
    for name, value in model.state_dict().items():
        value = value.clone()
        part, first, *rest = name.split(".")
        if part == "backbone":
            state[f"backbone.{_backbone(first, rest)}"] = value
        elif name == "projection.level_embed":
            state["transformer.level_embeds"] = value
        elif part == "projection":
            level, step, leaf = rest
            place = f"convs.{level}" if int(level) < maps else f"extra_convs.{int(level) - maps}"
            state[f"neck.{place}.{('conv', 'norm')[int(step)]}.{leaf}"] = value
        elif part in ("encoder", "decoder") and first == "layers":
            state[f"transformer.{part}.layers.{rest[0]}.{_layer(part, rest[1:])}"] = value
        elif first in ("class_embed", "bbox_embed"):
            numbers = [layers] if part == "proposals" else range(layers)
            if rest[0].isdecimal():
                numbers = [rest.pop(0)]
            for number in numbers:
                head = ".".join([first, str(number), *rest])
                state[head] = state[f"transformer.decoder.{head}"] = value.clone()
        elif first == "label_enc":
            state["label_enc.weight"] = value[:-1]
        elif part in ("proposals", "queries"):
            state[".".join(["transformer", first, *rest])] = value
        else:
            state[f"transformer.{name}"] = value
    return state


def _backbone(first: str, rest: list[str]) -> str:
    place = "stem"
    if first.startswith("layer"):
        place = f"res{int(first[5:]) + 1}.{rest[0]}"
        first, *rest = rest[1:]
    if first == "downsample":
        which, *rest = rest
        return ".".join([place, "shortcut", *(["norm"] if which == "1" else []), *rest])
    return ".".join([place, f"conv{first[-1]}", *(["norm"] if first.startswith("bn") else []), *rest])


def _layer(part: str, words: list[str]) -> str:
    names = (_ENCODER if part == "encoder" else _DECODER) | _FFN
    found = next(count for count in (1, 2) if ".".join(words[:count]) in names)
    return ".".join([names[".".join(words[:found])], *words[found:]])
