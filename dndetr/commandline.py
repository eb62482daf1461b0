"""What all commands share: flags from dataclasses by tyro, and mistakes told in one plain line with an exit status."""

import contextlib
import io
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from .output import in_words, unfailing

Arguments = TypeVar("Arguments")

ModelPath = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="RUN_OR_CHECKPOINT",
        help="A run folder (its latest checkpoint), a checkpoint file, or a DETR of transformers: folder or hub name.",
    ),
]
PresetName = Annotated[
    str | None,
    tyro.conf.arg(help="The model of a file that has only weights, such as dn-detr-r50 for an official DN-DETR file."),
]
DeviceName = Annotated[str, tyro.conf.arg(help="auto, cpu, cuda or cuda:N.")]


def program(
    kind: type[Arguments], command: Callable[[Arguments], object], name: str, about: str
) -> Callable[[Sequence[str] | None], int]:
    """The ``main`` of ``python -m dndetr.<name>``: flags (None: those of the process) -> exit status.

    kind: the dataclass that the flags make; command: what is done with it; about: first lines of ``--help``.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        return exit_status(lambda: run(parse(kind, arguments, f"python -m dndetr.{name}", description=about)))

    def run(parsed: Arguments) -> None:
        if "torch" not in sys.modules:  # nobody has set it, and mistakes are to be told before it is imported
            command(parsed)
            return
        from .context import own_context

        with own_context():
            command(parsed)

    return main


def parse(kind: type[Arguments], arguments: Sequence[str] | None, prog: str, **options) -> Arguments:
    """``tyro.cli`` for a dataclass; ValueError, in one line, for what does not parse.

    arguments: None for those of the process; options are handed on. ``--help`` prints and exits as usual.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(kind, args=arguments, prog=prog, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(f"{_unboxed(told.getvalue())} ({prog} --help lists all flags)") from None


@unfailing()
def exit_status(command: Callable[[], object]) -> int:
    """Run a command -> 0; 1 with one line on stderr for what the user can mend; 130 after Ctrl-C. Warnings are one too.

    Whatever it prints may go nowhere. Only where printing was all (``--help | head``) the status is 141, as the shell
    has it.
    """
    warnings.formatwarning = _in_one_line
    try:
        command()
    except SystemExit as end:
        sys.stdout.flush()
        if not end.code and sys.stdout.unread:
            return 128 + signal.SIGPIPE
        raise
    except MemoryError as error:
        print(f"error: memory ran out; use smaller images, or fewer at once {error}".rstrip(), file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {' '.join(in_words(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _in_one_line(message, category, filename, lineno, line=None) -> str:
    """A warning for users without the line of code that it comes from; those for developers as Python has them."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _unboxed(text: str) -> str:
    """The message inside tyro's box (drawn in lines or in ASCII), without frame, title and line breaks."""
    paragraphs = [""]
    for line in text.splitlines():
        line = line.strip("│╭╮╰╯|+ ")
        if line.endswith(("──", "--")):
            paragraphs.append("")
        else:
            paragraphs[-1] += f" {line}"
    # Only the title has neither a colon nor a full stop.
    message = next((part for part in paragraphs if ":" in part or "." in part), text)
    return _of_no_type(re.sub(r"^Error parsing \w+: ", "", " ".join(message.split())))


def _of_no_type(message: str) -> str:
    """What tyro says of a value that is of none of a flag's types, without each parser's own words."""
    found = re.match(r"Error parsing (\S+): no type matching (.+?) could be instantiated from \['(.*?)'\]", message)
    if found is None:
        return message
    flag, types, value = found[1], found[2], found[3].replace("', '", " ")
    words = {"FLOAT": "a number", "INT": "a whole number", "PATH": "a path", "STR": "a text"}
    kinds = [re.sub("[{}]", "", kind).split() for kind in types.split("|") if kind != "{None}"]
    wanted = [" and ".join(words.get(part, part) for part in kind) for kind in kinds]
    return f"{flag} {value}: give {' or '.join(wanted)}"
