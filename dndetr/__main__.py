"""``dndetr COMMAND ...`` and ``python -m dndetr COMMAND ...``: the same as ``python -m dndetr.COMMAND ...``."""

import difflib
import sys
from importlib import import_module

from .output import unfailing

COMMANDS = {
    "train": "train a detector; without arguments on built-in synthetic shapes",
    "evaluate": "score a trained detector on a data set: COCO's numbers, classes, figures",
    "compare": "train with one setting changed and show what it buys; by default, denoising",
    "health": "what denoising does in a trained detector: boxes restored, leaks, cost",
    "predict": "draw what a trained detector finds in images, folders and videos",
    "export": "write a trained detector as an ONNX or torch.export file",
    "check_data": "look for everything that is wrong with a data set",
    "convert": "write a data set as COCO or YOLO, whatever it is now",
    "shapes": "write the built-in data as a COCO-format folder",
    "profile": "trace training steps, or count one without a GPU, and name their dearest parts",
    "bench": "compare benchmark results",
    "doctor": "say what is installed and built, and which implementation every op takes",
}


def usage() -> str:
    """One line per command."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(["usage: dndetr COMMAND [options]", "", *rows, "", "dndetr COMMAND --help lists its options."])


@unfailing()
def main() -> int | None:
    """Run the command named by the first argument on the rest."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage())
        return 0 if len(sys.argv) > 1 else 2
    command = sys.argv[1]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"dndetr: no command {command!r}, {hint}", file=sys.stderr)
        return 2
    sys.argv = [f"dndetr {command}", *sys.argv[2:]]
    return import_module(f"dndetr.{command}").main()


if __name__ == "__main__":
    sys.exit(main())
