"""README.md of a detector that is given away: what the hub reads of it, how it was trained, how it is used."""

import json
from pathlib import Path

from .. import __version__
from ..config import Config
from ..data.classes import Classes, distinct_names, listed

_METRICS = {"AP": "AP at IoU 0.50:0.95", "AP50": "AP at IoU 0.50", "AP75": "AP at IoU 0.75"}
_CARD = """---
license: unknown  # yours to say
library_name: transformers
pipeline_tag: object-detection
tags:
- object-detection
- {kind}
- dndetr
{results}---

# {title}

{architecture} for {count} classes ({classes}).
{training}
## Use

```python
from transformers import pipeline

detector = pipeline("object-detection", model="{title}")
print(detector("photo.jpg", threshold=0.5))
```

With dndetr, which also goes on with the training (`python -m dndetr.train --init {title}`):

```python
import dndetr

print(dndetr.load("{title}").predict("photo.jpg"))
```

`dndetr.safetensors` has what dndetr keeps beside, and in its header the settings of the run. transformers has no use
for it.
"""
_TRAINED = """Trained by dndetr {version}. {denoised}Nothing of the training is left in the weights, so transformers
reads them without dndetr.

## Training

| | |
| --- | --- |
{table}
"""
_DENOISED = """Its decoder was also fed noised ground-truth boxes, which it learned to restore (query denoising,
[arXiv 2203.01305](https://arxiv.org/abs/2203.01305)). """
_METRIC = """    - type: {key}
      name: {name}
      value: {value:.4f}
"""
_RESULTS = """datasets:
- {data}
model-index:
- name: {name}
  results:
  - task:
      type: object-detection
    dataset:
      type: {data}
      name: {data}
    metrics:
{metrics}"""


def model_card(name: str, kind: str, architecture: str, config: Config, classes: Classes, scores: dict) -> str:
    """The text of README.md. scores: AP and others of the weights, and their epoch; {} where none is known.

    Of a detector that was trained elsewhere nothing is said of training.
    """
    data = Path(config.data_name or "").name
    found = {key: scores[key] for key in _METRICS if scores.get(key) is not None}
    metrics = [_METRIC.format(key=key, name=_METRICS[key], value=value) for key, value in found.items()]
    quoted = {key: json.dumps(text, ensure_ascii=False) for key, text in (("data", data), ("name", name))}
    return _CARD.format(
        kind=kind,
        title=name,
        results=_RESULTS.format(**quoted, metrics="".join(metrics)) if data and metrics else "",
        architecture=architecture,
        count=len(classes),
        classes=listed(distinct_names(classes), 10),
        training=_training(data, config, scores, found) if data else "",
    )


def _training(data: str, config: Config, scores: dict, found: dict) -> str:
    rows = {
        "preset": config.preset,
        "data": data,
        "epochs": f"{scores['epoch']} of {config.epochs}" if "epoch" in scores else config.epochs,
        "images a step": config.batch_size * config.accumulate,
        "learning rate": f"{config.lr:g}",
        "denoising groups": config.denoising.groups,
        "images": _images(config),
    }
    rows |= {_METRICS[key]: f"{value:.3f}" for key, value in found.items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return _TRAINED.format(version=__version__, denoised=_DENOISED if config.denoising.groups else "", table=table)


def _images(config: Config) -> str:
    images = config.images
    if images.recipe == "fixed":
        return "resized to {} x {}".format(*images.canvas)
    if images.recipe == "original":
        return "as they are"
    return f"short side {images.eval_size}, long side at most {images.max_size}"
