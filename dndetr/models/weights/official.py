"""Reads state dictionaries of the official DN-DETR, DINO and DAB-DETR code: the same tensors under our names."""

import re
from collections.abc import Iterable

from torch import Tensor

# In order; the first pattern that matches decides.
_RENAMES = (
    (r"backbone\.0\.(?:body\.)?(.*)", r"backbone.\1"),
    (r"(class|bbox)_embed\.(.*)", r"decoder.\1_embed.\2"),
    (r"(label_enc|refpoint_embed|tgt_embed)\.weight", r"queries.\1.weight"),
    (r"transformer\.(patterns|tgt_embed)\.weight", r"queries.\1.weight"),
    (r"transformer\.enc_out_(class|bbox)_embed\.(.*)", r"proposals.\1_embed.\2"),
    (r"transformer\.(enc_output|enc_output_norm)\.(.*)", r"proposals.\1.\2"),
    (r"transformer\.level_embed", "projection.level_embed"),
    (r"input_proj\.(weight|bias)", r"projection.projections.0.\1"),
    (r"input_proj\.(.*)", r"projection.projections.\1"),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.(.*)", r"encoder.layers.\1.ffn.norm.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.norm3\.(.*)", r"decoder.layers.\1.ffn.norm.\2"),
    (r"transformer\.(\w+)\.layers\.(\d+)\.(linear1|linear2|activation)\.(.*)", r"\1.layers.\2.ffn.\3.\4"),
    (r"transformer\.decoder\.layers\.(\d+)\.ca_out_v_proj\.(.*)", r"decoder.layers.\1.ca_out_proj.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.lvl_attn\.(.*)", r"decoder.layers.\1.level_gate.\2"),
    (r"transformer\.(.*)", r"\1"),
)
# The dense decoder's output projections sit in attention modules of which nothing else is left; the deformable
# decoder's modules of the same names are whole, and keep them.
_DENSE_RENAMES = (
    (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.out_proj\.(.*)", r"decoder.layers.\1.sa_out_proj.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.cross_attn\.out_proj\.(.*)", r"decoder.layers.\1.ca_out_proj.\2"),
)


def official_names(names) -> dict[str, str]:
    """Names in an official state dictionary -> ours. Unknown names keep theirs.

    The heads appear there under two names, once in the decoder; both become the same one.
    """
    names = list(names)
    renames = _RENAMES
    if any(name.endswith("sa_qcontent_proj.weight") for name in names):
        renames = (*_DENSE_RENAMES, *renames)
    layers = [int(found[1]) for name in names if (found := re.match(r"(?:class|bbox)_embed\.(\d+)\.", name))]
    if layers and encoder_heads_last(names):
        last = (rf"(?:transformer\.decoder\.)?(class|bbox)_embed\.{max(layers)}\.(.*)", r"proposals.\1_embed.\2")
        renames = (last, *renames)
    ours = {}
    for name in names:
        for pattern, replacement in renames:
            match = re.fullmatch(pattern, name)
            if match:
                ours[name] = match.expand(replacement)
                break
        else:
            ours[name] = name
    return ours


def encoder_heads_last(names: Iterable[str]) -> bool:
    """Whether the encoder's heads come after the decoder's, as in DN-DETR's repository, without names of their own."""
    names = list(names)
    return "transformer.enc_output.weight" in names and not any(n.startswith("transformer.enc_out_") for n in names)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official state dictionary under our names.

    DAB-DETR has no label table: its matching queries start from zero, which becomes the table's only row, "unknown".
    DAB-Deformable-DETR's query contents are one wider, since no column is an indicator; the last is left out.
    ValueError where two names of the same head hold different ones, as in a file of which one was edited.
    """
    ours: dict[str, Tensor] = {}
    for theirs, name in official_names(state).items():
        if name in ours and not ours[name].equal(state[theirs]):
            raise ValueError(f"{theirs} is not the tensor that it has under the head's other name")
        ours[name] = state[theirs]
    anchor_head = ours.get("decoder.ref_point_head.layers.1.weight")
    if anchor_head is not None and "queries.label_enc.weight" not in ours:
        narrow = anchor_head.shape[0] - 1
        ours["queries.label_enc.weight"] = anchor_head.new_zeros(1, narrow)
        if "queries.tgt_embed.weight" in ours:
            ours["queries.tgt_embed.weight"] = ours["queries.tgt_embed.weight"][:, :narrow]
    return ours


# The classes of official files: COCO's category ids, which have gaps, are the rows of their class heads.
_COCO_NAMES = """
1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat, 10 traffic light,
11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow,
22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase, 34 frisbee,
35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard, 42 surfboard,
43 tennis racket, 44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl, 52 banana, 53 apple,
54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake, 62 chair, 63 couch,
64 potted plant, 65 bed, 67 dining table, 70 toilet, 72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard,
77 cell phone, 78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator, 84 book, 85 clock, 86 vase, 87 scissors,
88 teddy bear, 89 hair drier, 90 toothbrush
"""
_ENTRIES = (entry.strip().partition(" ") for entry in _COCO_NAMES.split(","))
COCO_CLASSES: tuple[tuple[int, str], ...] = tuple((int(number), name) for number, _, name in _ENTRIES)
