"""One call to a GPU machine that may be cut at any moment: what its blocks find is in OUT as soon as it is found.

Blocks run one after another in one process, each where enough of the time is left. Whatever a block raises is written
down and the rest goes on; where it broke the GPU's context, as an access outside of memory does, the process starts
itself anew behind it. A block fills a dict as it goes, so what it measured before it failed is kept. OUT gets
``<gpu>-first.json`` and ``logs.tgz``, replaced as wholes after every block and now and then within the long ones.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dndetr import _process  # noqa: F401 isort: skip  (before torch: everything is timed as it runs in training)
from dndetr.files import write_atomic, write_json_atomic


class Block(NamedTuple):
    """``run(call, found)`` puts what it finds into a dict."""

    name: str
    need: int  # seconds: with less left it is skipped
    most: int  # seconds: it is stopped then
    run: Callable[["Call", dict], None]


class OutOfTime(BaseException):
    """A block took all that it may; no Exception, so that no loop over contenders takes it for a failure of one."""


class Call:
    """The blocks of a call, what they found, and the files that leave."""

    def __init__(self, name: str, out: Path, seconds: float, logs: Path | None = None):
        """logs: the folder of a process that started this one anew; what it wrote is gone on with."""
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.logs = out, logs or Path(tempfile.mkdtemp(prefix="dndetr-logs-"))
        self.results = out / f"{gpu_name()}.json"  # of the recorded benchmarks
        self.path = self.results.with_stem(f"{self.results.stem}-{name.lower()}")
        self.content = json.loads(self.path.read_text()) if logs else {"provenance": None, "blocks": {}}
        self._ends = self._block_ends = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds of the call."""
        return self._ends - time.monotonic()

    def left_of_block(self) -> float:
        """Seconds of the block that runs."""
        return self._block_ends - time.monotonic()

    def save(self) -> None:
        """Write all that is known by now."""
        write_json_atomic(self.path, plain(self.content), indent=1)

        def pack(file) -> None:
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=3) as tar:
                tar.add(self.logs, "logs")

        write_atomic(self.out / "logs.tgz", pack)

    def run(self, block: Block) -> None:
        """Run a block, if there is time; only an interrupt is passed on."""
        started, left = time.monotonic(), self.left()
        told = self.content["blocks"][block.name] = {"result": {}}
        if left < block.need:
            told["skipped"] = f"{max(left, 0):.0f} s were left, {block.need} are needed"
            print(f"{block.name}: skipped: {told['skipped']}", flush=True)
            return
        self._block_ends = started + min(left, block.most)
        try:
            with out_of_time_after(self.left_of_block()):
                block.run(self, told["result"])
        except BaseException as failure:
            told["failed"] = f"{type(failure).__name__}: {failure}"[:1000]
            with (self.logs / "failures.log").open("a") as log:
                log.write(f"== {block.name}\n{traceback.format_exc()}\n")
            if isinstance(failure, KeyboardInterrupt):
                raise
        finally:
            told["seconds"] = round(time.monotonic() - started, 1)
            self.save()
        what = f"failed: {told['failed']}" if "failed" in told else "ok"
        print(f"{block.name}: {what} ({told['seconds']} s)", flush=True)

    def start_anew(self) -> None:
        """This process from its beginning, which goes on behind the blocks that are written."""
        sys.stdout.flush()
        script, name, out = sys.argv[:3]
        os.execv(sys.executable, [sys.executable, script, name, out, str(self.left()), str(self.logs)])


@contextlib.contextmanager
def out_of_time_after(seconds: float) -> Iterator[None]:
    """Within, OutOfTime is raised after some seconds."""

    def stop(*_):
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def plain(value):
    """A value as JSON has it; what JSON does not have, such as NaN or a dtype, in words."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    known = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def gpu_name() -> str:
    """The GPU's short name, such as h200; "gpu" where none is told."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    try:
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        words = []
    return words[1].lower() if len(words) > 1 else "gpu"


def context_is_lost() -> bool:
    """Whether every further use of the GPU would fail in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(plans: dict[str, Sequence[Block]], arguments: Sequence[str]) -> int:
    """Run the plan that the arguments name: NAME OUT SECONDS; exit status 1 if a block failed or was interrupted."""
    name, out, seconds, *logs = arguments
    if os.environ.get("DRY_RUN"):
        for block in plans[name]:
            print(block.name, block.need, block.most, sep="\t")
        return 0
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.default_int_handler)
    call = Call(name, Path(out), float(seconds), *map(Path, logs))
    with contextlib.suppress(KeyboardInterrupt):
        for block in plans[name]:
            if block.name in call.content["blocks"]:
                continue
            call.run(block)
            if "failed" in call.content["blocks"][block.name] and context_is_lost():
                call.start_anew()
        call.content["ended"] = True
        call.save()
    return int(not call.content.get("ended") or any("failed" in told for told in call.content["blocks"].values()))
