"""Whether the installed transformers is one that this package was tested with, and how it is kept quiet."""

import contextlib
from collections.abc import Iterator
from importlib import metadata

OLDEST, FIRST_UNTESTED = (5, 20), (6, 0)
TESTED = "5.24.*"


def require_transformers(feature: str) -> None:
    """Raise ImportError, saying what to type, where transformers is missing or outside the tested range."""
    wanted = f"'transformers>={_dotted(OLDEST)},<{_dotted(FIRST_UNTESTED)}' accelerate"
    try:
        found = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise ImportError(f"{feature} needs transformers, which is not installed: pip install {wanted}") from None
    version = tuple(int(part) for part in found.split(".")[:2])
    if not OLDEST <= version < FIRST_UNTESTED:
        raise ImportError(f"{feature} does not support transformers {found}: pip install {wanted}")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within, transformers prints neither bars nor reports: what matters of them is said by whoever asks."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
