"""Models of transformers: which folders and files are theirs, and names on the hub, ``owner/name``, fetched once."""

import json
import re
from pathlib import Path

DETECTORS = {"dab-detr": "DAB-DETR", "deformable_detr": "Deformable DETR"}  # those that are read, by their model_type
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# The shape of a model's name, and endings of files, which none has.
NAME = r"[\w-][\w.-]*/[\w.-]+"
_FILES = (".pt", ".pth", ".pkl", ".bin", ".ckpt", ".safetensors")
_BESIDE = ("config.json", "preprocessor_config.json", "dndetr.safetensors")


def is_hub_name(text: str) -> bool:
    """Whether this can only be a name on the hub: it looks like one, and nothing of what it would name is here."""
    looks = re.fullmatch(rf"(?!runs/){NAME}", text) is not None and not text.endswith(_FILES)
    return looks and not Path(text).exists() and not Path(text).parent.exists()


def is_of_transformers(path: str | Path) -> bool:
    """Whether this is a folder or hub name of transformers, of whatever model, or the file of a detector in one.

    Folders are known by their config.json, which names the kind of model, as those of our runs do not. Files of other
    models may have a backbone to take.
    """
    if is_hub_name(str(path)):
        return True
    path = Path(path)
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not path.exists() or not config.is_file() or (path.is_dir() and (path / "checkpoint.pt").exists()):
        return False
    try:
        theirs = json.loads(config.read_text())
    except ValueError:
        return path.is_dir() or path.name in WEIGHTS  # broken, and said to be when it is read
    kind = theirs.get("model_type") if isinstance(theirs, dict) else None
    return kind is not None if path.is_dir() else kind in DETECTORS


def fetched(name: str) -> Path:
    """The folder with a model's configuration and weights, from the hub or from what was fetched before.

    ModuleNotFoundError, OSError or ValueError, in one line, where there is no huggingface_hub, no network, or no model.
    """
    by_hand = f"fetch config.json, preprocessor_config.json and model.safetensors of {name}, and give their folder"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise ModuleNotFoundError(
            f"{name} is no folder here, and the hub needs huggingface_hub: pip install huggingface_hub; or {by_hand}"
        ) from None
    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            patterns = [*_BESIDE, weights, f"{weights.replace('*', '')}.index.json"]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            if any(folder.glob(weights)):
                break
    except GatedRepoError:
        raise OSError(
            f"{name} is given to those who have accepted its licence (as all of DINOv3): accept it on its page of the "
            f"hub, then type hf auth login; or {by_hand}"
        ) from None
    except LocalEntryNotFoundError:
        raise OSError(
            f"{name} is no folder here, the hub cannot be reached, and it was not fetched before: {by_hand}"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name} is no folder here, and the hub has no such model, or not for you: look the name up, or {by_hand}"
        ) from None
    except Exception as error:  # whatever the network and its library raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise OSError(f"{name} is no folder here, and could not be fetched ({reason}): {by_hand}") from error
    if not (folder / "config.json").is_file():
        raise OSError(f"{name} has no config.json, so it is no model of transformers: give another name")
    return folder
