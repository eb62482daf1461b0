"""Paths that a run remembers: they hold wherever they are read, as long as what they name is there."""

from dataclasses import replace
from pathlib import Path

from ..config import Config
from ..data.errors import DataError
from ..demands import demand
from ..hub import is_hub_name


def remembered(config: Config) -> Config:
    """What a run keeps of its configuration: paths are absolute, so that they hold wherever they are read."""
    names = [name for name in ("data", "split_file", "output", "resume", "init") if getattr(config, name) is not None]
    if config.data == "shapes":
        names.remove("data")
    if config.init is not None and is_hub_name(config.init):
        names.remove("init")
    typed = {name: getattr(config, name) for name in names}
    absolute = {name: str(Path(path).absolute()) for name, path in typed.items()}
    given = {name: path for name, path in typed.items() if path != absolute[name]}
    return replace(config, **absolute, given=config.given | given)


def given_away(config: Config) -> Config:
    """A configuration for others to read: the data by their folder's name, and no path of the machine they were on."""
    name = config.data_name
    own = config.data == "shapes"
    init = config.init if config.init is not None and is_hub_name(config.init) else None
    backbone = config.model.backbone
    if Path(backbone.name).is_absolute() or Path(backbone.name).exists():
        backbone = replace(backbone, name="")  # its settings say what it is
    return replace(
        config,
        data=config.data if own else None,
        split_file=None,
        output=None,
        resume=None,
        init=init,
        model=replace(config.model, backbone=backbone),
        given={} if own or name is None else {"data": Path(name).name},
    )


def with_data(
    config: Config, data: str | None, val_share: float | None = None, split_file: Path | None = None
) -> Config:
    """A run's configuration for other data, divided as asked; data: None for the run's own, as the run divided it."""
    if data is None:
        for flag, value in (("val-share", val_share), ("split-file", split_file)):
            demand(value is None, flag, value, "--data DIR too, since the run's own data is divided already")
        return config
    given = {name: path for name, path in config.given.items() if name not in ("data", "split_file")}
    file = None if split_file is None else str(split_file)
    return replace(config, data=data, val_share=val_share, split_file=file, given=given)


def demand_data_there(config: Config) -> None:
    """DataError, with what to do, where the data set that a run remembers, or its division, is no longer there."""
    if config.data not in (None, "shapes") and not Path(config.data).exists():
        raise DataError(f"{config.data}: no such folder; if the run's data set has moved, say where it is: --data DIR")
    if config.split_file is not None and not Path(config.split_file).exists():
        raise DataError(f"{config.split_file}: no such file, and it says what this run validates on; put it back there")
