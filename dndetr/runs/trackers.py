"""TensorBoard, W&B, MLflow and others, each with what accelerate leaves to its users: how a tracker is started and
continued, and where its texts, pictures and tables go. docs/trackers.md shows what a user sees of it.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import Config
from .tracker import Tracker, as_markdown, flat_settings

_NOT_IN_MLFLOW = re.compile(r"[^-. :\w]")  # of the names of metrics, below their first slash


class TensorBoard(Tracker):
    """In the run's folder ``tensorboard``, written anew when the run goes on: neither gaps nor what was forgotten."""

    name, module = "tensorboard", "torch.utils.tensorboard"
    needs = '--tensorboard needs TensorBoard: pip install -e ".[tensorboard]"'
    starts_anew = True

    def _options(self, continued: str | None) -> dict[str, Any]:
        if (self._folder / "tensorboard").exists():
            shutil.rmtree(self._folder / "tensorboard")
        return {"run_name": "tensorboard", "logging_dir": self._folder}

    def _send_picture(self, path: Path, step: int) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._tracker.log_images({path.stem: pixels[None]}, step=step, dataformats="NHWC")

    def _send_table(self, rows: list[list]) -> None:
        self._send_text("classes", as_markdown(rows), self._step)


class WandB(Tracker):
    """Steps there only rise: of those that are done again after a kill, the first numbers stay."""

    name = module = "wandb"
    needs = '--tracker wandb needs wandb: pip install -e ".[trackers]" wandb'

    def _options(self, continued: str | None) -> dict[str, Any]:
        import wandb

        # W&B's copy of what is printed would stand between the live lines and the terminal.
        settings = {"console": "off"} | ({"silent": True} if self._run.config.quiet else {})
        again = {} if continued is None else {"id": continued, "resume": "allow"}
        # One that the caller has begun would be taken for this one, and ended with it.
        beside = {} if wandb.run is None else {"reinit": "create_new"}
        named = {"run_name": self._run.config.project, "name": self._title}
        return named | again | beside | {"dir": str(self._folder), "settings": settings}

    def _id(self) -> str:
        return self._tracker.tracker.id

    def _send_settings(self, values: dict[str, Any]) -> None:
        self._tracker.tracker.config.update(values)

    def _send_text(self, name: str, text: str, step: int) -> None:
        # Not by step: a warning may be known before the numbers of an earlier one, which W&B would then refuse.
        self._tracker.tracker.summary[name] = text

    def _send_summary(self, statistics: dict[str, float]) -> None:
        self._tracker.tracker.summary.update(statistics)

    def _finish(self, how: str) -> None:
        self._tracker.tracker.finish(exit_code=int(how != "finished"))


class MLflow(Tracker):
    """Where MLflow keeps what it is told; its metrics have no other names than letters, digits and ``_-. :/``."""

    name = module = "mlflow"
    needs = '--tracker mlflow needs mlflow: pip install -e ".[trackers]" mlflow'

    def _options(self, continued: str | None) -> dict[str, Any]:
        # A server that is gone is asked 8 times for two minutes otherwise, while several processes wait for this one.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        named = {"experiment_name": self._run.config.project, "run_name": self._title}
        return named | {"run_id": continued, "nested_run": True}  # within a run of the caller's, if there is one

    def _id(self) -> str:
        return self._tracker.tracker.info.run_id

    def _send_numbers(self, values: dict[str, float], step: int) -> None:
        parts = [(*name.split("/", 1), value) for name, value in values.items()]
        plain = {f"{kind}/{_NOT_IN_MLFLOW.sub('_', name)[:200]}": value for kind, name, value in parts}
        super()._send_numbers(plain, step)

    def _send_text(self, name: str, text: str, step: int) -> None:
        self._client.set_tag(self._id(), name, text)

    def _send_picture(self, path: Path, step: int) -> None:
        self._tracker.log_artifact(str(path))

    def _send_table(self, rows: list[list]) -> None:
        self._client.log_text(self._id(), as_markdown(rows), "classes.md")

    def _finish(self, how: str) -> None:
        import mlflow

        mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED"}.get(how, "FAILED"))

    @property
    def _client(self):
        from mlflow import MlflowClient

        return MlflowClient()


class Trackio(Tracker):
    """Its runs go on by their name, and are given their settings with it, then too."""

    name = module = "trackio"
    needs = '--tracker trackio needs trackio: pip install -e ".[trackers]" trackio'

    def _options(self, continued: str | None) -> dict[str, Any]:
        named = {"run_name": self._run.config.project, "name": continued or self._title}
        return named | {"resume": "allow" if continued else "never", "config": flat_settings(self._run.config)}

    def _id(self) -> str:
        return self._tracker.tracker.name

    def _send_picture(self, path: Path, step: int) -> None:
        import trackio

        self._tracker.log({path.stem: trackio.Image(str(path))}, step=step)

    def _send_table(self, rows: list[list]) -> None:
        self._send_text("classes", as_markdown(rows), self._step)


class ClearML(Tracker):
    """Shown is only what is sent here: it watches nothing of torch, of the arguments and of what is printed."""

    name = module = "clearml"
    needs = '--tracker clearml needs clearml: pip install -e ".[trackers]" clearml'

    def _options(self, continued: str | None) -> dict[str, Any]:
        from clearml import Task

        Task.set_random_seed(None)  # it seeds torch's generators otherwise
        watched = ("auto_connect_frameworks", "auto_connect_arg_parser", "auto_connect_streams")
        named = {"run_name": self._run.config.project, "task_name": self._title}
        return named | dict.fromkeys(watched, False) | {"continue_last_task": continued, "reuse_last_task_id": False}

    def _start(self, continued: str | None) -> None:
        super()._start(continued)
        if continued is not None:  # else it counts its steps on from the last one
            self._tracker.tracker.set_initial_iteration(0)

    def _id(self) -> str:
        return self._tracker.tracker.id

    def _send_text(self, name: str, text: str, step: int) -> None:
        self._tracker.tracker.get_logger().report_text(f"{name} at step {step}: {text}")

    def _send_picture(self, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self._tracker.log_images({path.stem: image.convert("RGB")}, step=step)

    def _send_summary(self, statistics: dict[str, float]) -> None:
        self._tracker.log(statistics)


class Comet(Tracker):
    """Shown is only what is sent here, as with ClearML."""

    name, module = "comet_ml", "comet_ml"
    needs = '--tracker comet needs comet_ml: pip install -e ".[trackers]" comet_ml'

    def _options(self, continued: str | None) -> dict[str, Any]:
        import comet_ml

        watched = ("auto_metric_logging", "auto_param_logging", "log_code", "log_graph", "parse_args")
        config = comet_ml.ExperimentConfig(name=self._title, **dict.fromkeys(watched, False), auto_output_logging=False)
        again = {} if continued is None else {"experiment_key": continued}
        return {"run_name": self._run.config.project, "experiment_config": config} | again

    def _id(self) -> str:
        return self._tracker.tracker.get_key()

    def _send_picture(self, path: Path, step: int) -> None:
        self._tracker.tracker.log_image(str(path), name=path.stem, step=step)

    def _send_table(self, rows: list[list]) -> None:
        self._tracker.tracker.log_table("classes.csv", tabular_data=rows, headers=["class", "AP"])


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
    "clearml": ClearML,
    "comet": Comet,
}


def chosen_trackers(config: Config) -> list[Tracker]:
    """Those of ``--tensorboard`` and ``--tracker``, each once; ModuleNotFoundError where one is not installed."""
    return [TRACKERS[name]() for name in dict.fromkeys((*("tensorboard",) * config.tensorboard, *config.tracker))]
