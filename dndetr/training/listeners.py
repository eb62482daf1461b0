"""Who watches a run, in the order in which they are told."""

from collections.abc import Sequence

from ..config import Config
from ..pictures.run import Pictures
from ..runs.checkpoint import BestCheckpoint
from ..runs.console import Console
from ..runs.early_warnings import EarlyWarnings
from ..runs.listener import Listener, Listeners
from ..runs.results import DetectionsFile
from ..runs.run_log import RunLog
from ..runs.trackers import chosen_trackers


def all_listeners(config: Config, console: Console, others: Sequence[Listener] = ()) -> Listeners:
    """Those of every run, and others of the user's."""
    files = [Pictures(), RunLog(), DetectionsFile(), BestCheckpoint()]
    return Listeners(files, [console, *chosen_trackers(config), *others, EarlyWarnings()])
