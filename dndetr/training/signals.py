"""Signals that ask a run to end: noted when they come, heeded between two steps."""

import signal
import threading

_HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal asked the run to end; it was saved and can be resumed."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.number = number


class StopSignal:
    """Within, ``number`` is the signal that asks the run to end, once there is one; a second one does not wait.

    ``received`` is a signal that really came: there is none where only ``ask`` was called. A SIGHUP that is ignored, as
    under nohup, stays so. Python lets the main thread alone handle signals. In another one they are left to the caller,
    and ``ask`` remains.
    """

    def __init__(self):
        self.number: int | None = None
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        main = threading.current_thread() is threading.main_thread()
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heeded = [number for number in _HEEDED if main and not (nohup and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ask(self, number: int = signal.SIGTERM) -> None:
        """As if that signal had come; asked again, it stays with the first."""
        self.number = self.number or number

    def _note(self, number: int, _frame) -> None:
        if self.number is None:
            self.number = self.received = number
        elif number != signal.SIGHUP:  # of a terminal that closes, kernel and shell each send one
            raise KeyboardInterrupt
