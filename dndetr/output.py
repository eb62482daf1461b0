"""What a command prints: lost where it cannot go, and never the end of the command."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO


class Unfailing:
    """A text stream that takes every text; made by ``unfailing``.

    What its encoding lacks is escaped. What cannot be written (a full disk, a terminal that is gone, nobody who reads
    along) is dropped. ``unread``: whether something was dropped since nobody reads.
    """

    def __init__(self, stream: TextIO):
        self._stream, self.unread = stream, False

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write all of it, or drop it."""
        with self._dropping():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self._stream, "encoding", None) or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what was written, if that is possible."""
        with self._dropping():
            self._stream.flush()

    def drain(self) -> None:
        """Hand on what was written, or forget it: the interpreter would try again at its end, and complain."""
        try:
            self._stream.flush()
        except ValueError:  # closed
            pass
        except OSError:
            with self._dropping(), open(os.devnull, "wb") as nowhere:
                place = self._stream.fileno()
                kept = os.dup(place)
                os.dup2(nowhere.fileno(), place)
                try:
                    self._stream.flush()
                finally:
                    os.dup2(kept, place)
                    os.close(kept)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self.unread = True
        except (OSError, ValueError):  # the latter of a closed stream
            pass


@contextlib.contextmanager
def unfailing() -> Iterator[None]:
    """Within, ``sys.stdout`` and ``sys.stderr`` take every text, also where there are none, as under pythonw."""
    # Libraries in C write to descriptors 1 and 2, whatever file of ours was opened in the place of a closed one.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        ours = [_taking_all(stream, stack) for stream in before]
        sys.stdout, sys.stderr = ours
        try:
            yield
        finally:
            for name, own, other in zip(("stdout", "stderr"), ours, before, strict=True):
                own.drain()
                if getattr(sys, name) is own:  # and no other thread's, which restores it itself
                    setattr(sys, name, other)


def _taking_all(stream: TextIO | None, stack: contextlib.ExitStack) -> Unfailing:
    if isinstance(stream, Unfailing):
        return stream
    if stream is None or stream.closed:
        return Unfailing(stack.enter_context(open(os.devnull, "w")))
    return Unfailing(stream)


def in_words(error: Exception) -> str:
    """What an error says, without the system's number of it."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return ": ".join(str(part) for part in (error.filename, error.filename2, error.strerror) if part is not None)
