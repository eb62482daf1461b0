"""The result file of benchmarks, written anew with every result, so that what was measured outlives a kill."""

import json
from pathlib import Path

from dndetr.checkpoint import write_json_atomic


class Recording:
    """Results by name, in memory and in the file at ``path`` (None: nowhere).

    Results that the file already has from the same provenance are kept: benchmarks may be run one by one.
    """

    def __init__(self, path: Path | None, provenance: dict):
        self.path = path
        self.content = {"provenance": provenance, "results": {}}
        if path is not None and path.is_file():
            before = json.loads(path.read_text())
            if before["provenance"] == provenance:
                self.content["results"] = before["results"]

    def __call__(self, name: str, seconds: dict[str, float], **counted) -> None:
        """Keep a result, ``seconds`` by implementation; ``detail=True`` keeps it out of the README's table."""
        self.content["results"][name] = {"seconds": seconds, **counted}
        if self.path is not None:
            write_json_atomic(self.path, self.content, indent=1)
