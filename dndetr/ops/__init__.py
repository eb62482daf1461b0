"""The compute-heavy parts, one module per op: a plain reference, its fast twins, and the choice between them."""

from dndetr.ops.assign import assign
from dndetr.ops.match import Matches, match
from dndetr.ops.match_cost import CostWeights, match_cost

__all__ = ["CostWeights", "Matches", "assign", "match", "match_cost"]
