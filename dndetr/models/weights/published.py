"""Weights of a published backbone into the model's, all of them or none: transformers warns of gaps and goes on."""

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch

from ...data.classes import listed
from ...published_backbones import demand_weights
from ...transformers_installed import quiet_transformers
from ..transformers_backbone import TransformersBackbone

_NORMS = "hidden_states_norms."  # of the maps: they come with the backbone, not with classifiers


def load_published(backbone: TransformersBackbone, folder: Path) -> str:
    """Copy the weights in ``folder`` into ``backbone`` -> what was done, in words.

    Names are those of any model around it, a classifier for one, as transformers knows them. FileNotFoundError for
    weights that are not there, ValueError for what cannot be read and where any tensor of the backbone is missing or of
    another shape; norms of the maps alone may be new.
    """
    demand_weights(folder)
    model = backbone.model
    try:
        with quiet_transformers():
            loaded, found = type(model).from_pretrained(
                folder,
                config=copy.deepcopy(model.config),
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be told of all of them, here
            )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{folder}: its pytorch_model.bin is damaged, or holds more than tensors, which would be code to run: copy "
            "it again, or save it anew where it was made, model.save_pretrained(FOLDER)"
        ) from error
    except Exception as error:  # damaged files raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{folder}: its weights cannot be read ({reason}): copy them again") from error
    own = model.state_dict()
    needed = own.keys() - backbone.idle
    others = sorted(name for name, *_ in found["mismatched_keys"] if name in needed)
    missing = sorted(name for name in found["missing_keys"] if name in needed)
    new = [name for name in missing if name.startswith(_NORMS)]
    missing = [name for name in missing if name not in new]
    if missing or others:
        raise ValueError(f"{folder}: {_what_is_wrong(missing, others, len(needed))}")
    weights = loaded.state_dict()
    model.load_state_dict({name: weights[name] for name in own})
    text = f"{len(own) - len(new)} tensors of {folder}"
    return f"{text}; new: the norms of its maps ({len(new)})" if new else text


def _what_is_wrong(missing: Sequence[str], others: Sequence[str], needed: int) -> str:
    if len(missing) + len(others) > needed // 2:
        return (
            f"its weights are of another model than config.json: {listed(missing or others, 2)} are missing, or of "
            "another shape"
        )
    what = "are missing" if missing else "are of another shape"
    return f"{listed(missing or others, 2)} {what} in its weights: copy them, and config.json, again"
