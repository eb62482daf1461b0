"""What W&B keeps of an offline run, read from its file: a log in LevelDB's format, of protocol buffers."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def offline_records(run: Path) -> list:
    """The records of all offline runs in a run's folder, in the order of their start.

    W&B's own process may still be writing when a run has ended for its caller: the last record is that of its exit.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(100):
        files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
        runs = [[Record.FromString(content) for content in _contents(file.read_bytes())] for file in files]
        if all(any(record.HasField("exit") for record in records) for records in runs):
            break
        time.sleep(0.1)
    return [record for records in runs for record in records]


def items(entries) -> dict:
    """Names and values of a record's entries, such as those of a row of the history."""
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def _contents(log: bytes) -> Iterator[bytes]:
    place, parts = 7, b""  # after W&B's own header
    while place + 7 <= len(log):
        left = _BLOCK - place % _BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        parts = (b"" if kind in (_FULL, _FIRST) else parts) + log[place + 7 : place + 7 + length]
        if kind in (_FULL, _LAST):
            yield parts
        place += 7 + length
