"""Python in forks of one process that has done the slow imports: importing torch takes longer than most tests run."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_PARENT = """
import json, os, sys, traceback
exec(sys.argv[1])
for line in sys.stdin:
    program, folder, variables = json.loads(line)
    if os.fork() == 0:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the next programs are not for this one to read
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.environ |= variables
        status = 0
        try:
            exec(program, {"__name__": "__main__"})
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if end.code is not None and not isinstance(end.code, int):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # taking the interpreter down takes longer than all the rest
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""

Run = Callable[..., tuple[int, str, str]]


@contextlib.contextmanager
def forks(imports: str, environment: dict[str, str]) -> Iterator[Run]:
    """``run(program, folder, **variables)`` runs Python's text in a folder -> status, stdout, stderr.

    imports: what has been run before, once. The output is left in the folder, in the files ``stdout`` and ``stderr``.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def run(program: str, folder: Path, **variables: str) -> tuple[int, str, str]:
        try:
            parent.stdin.write(json.dumps([program, str(folder), variables]) + "\n")
            parent.stdin.flush()
            status = int(parent.stdout.readline())
        except BaseException:  # a limit of time: the next program must not take this one's status for its own
            parent.kill()
            raise
        return status, (folder / "stdout").read_text(), (folder / "stderr").read_text()

    with subprocess.Popen([sys.executable, "-c", _PARENT, imports], env=environment, **pipes) as parent:
        yield run
        parent.stdin.close()
