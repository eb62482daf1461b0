"""Whether the installed transformers is one that this package was tested with."""

from importlib import metadata

OLDEST, FIRST_UNTESTED = (5, 20), (6, 0)
TESTED = "5.23.*"


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


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
