"""How long an all-reduce takes on paper: a start, hops and bytes, for the algorithms that NCCL chooses between.

Every process has ``size`` bytes, of which all get the sum. A ring passes a process's share W - 1 times for the sum and
W - 1 times for its spreading (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009), so each process sends
2 (W - 1) / W of the size. A hierarchical one sums within nodes, then each process its share across the nodes, then
spreads within nodes; across the nodes goes a ring, or two trees, each of which carries half (Sanders, Speck and Traeff,
Parallel Computing 35, 2009; in NCCL since 2.4).
"""

from math import inf, log2
from typing import NamedTuple


class Protocol(NamedTuple):
    """One of NCCL's: seconds of a start, of a hop within a node and of one between nodes; share of a link's rate."""

    start: float
    hop: float
    network_hop: float
    share: float


# Those of NCCL's own model (src/graph/tuning.cc): "simple" of its ring, and "LL", whose messages carry their flags.
SIMPLE = Protocol(8.4e-6, 3.4e-6, 14e-6, 1.0)
LOW_LATENCY = Protocol(6.6e-6, 0.6e-6, 5e-6, 1 / 4)


class Links(NamedTuple):
    """A cluster: GPUs of a node; bytes per second and GPU, one way, within nodes and between them; NCCL's protocols.

    NVLink of an H100: 450 GB/s, of which NCCL's ring reaches 370 (NVIDIA/nccl-tests, issue 212). InfiniBand of 400 Gb/s
    for each GPU: 50 GB/s, of which 46 to 48 are reached (issue 290).
    """

    node: int = 8
    nvlink: float = 370e9
    network: float = 47e9
    protocols: tuple[Protocol, ...] = (SIMPLE, LOW_LATENCY)


H100S = Links()
INSTANT = Links(nvlink=inf, network=inf, protocols=(Protocol(0.0, 0.0, 0.0, 1.0),))


def ring(size: float, processes: int, links: Links, protocol: Protocol) -> float:
    """Seconds of one ring through all processes; between nodes it is one for each network card, side by side."""
    nodes = _nodes(processes, links)
    crossing = 2 * nodes if nodes > 1 else 0
    rate = links.nvlink if nodes == 1 else min(links.nvlink, links.node * links.network)
    waiting = (2 * (processes - 1) - crossing) * protocol.hop + crossing * protocol.network_hop
    return protocol.start + waiting + 2 * (processes - 1) / processes * size / (rate * protocol.share)


def hierarchical(size: float, processes: int, links: Links, protocol: Protocol, trees: bool) -> float:
    """Seconds within nodes, and of a ring or two trees across them, of each GPU with its likes of the other nodes."""
    nodes = _nodes(processes, links)
    local = processes // nodes
    hops = 2 * (local - 1) * protocol.hop
    seconds = 2 * (local - 1) / local * size / links.nvlink
    if nodes > 1:
        across = size / local / links.network
        hops += (2 * log2(nodes) if trees else 2 * (nodes - 1)) * protocol.network_hop
        seconds += across * (2 if trees else 2 * (nodes - 1) / nodes)
    return protocol.start + hops + seconds / protocol.share


def all_reduce(size: float, processes: int, links: Links = H100S) -> float:
    """Seconds of the fastest one, as NCCL chooses by such formulas; size: bytes, the same in each process.

    ValueError for processes that fill no whole nodes.
    """
    if processes == 1:
        return 0.0
    return min(
        seconds
        for protocol in links.protocols
        for seconds in (
            ring(size, processes, links, protocol),
            hierarchical(size, processes, links, protocol, trees=False),
            hierarchical(size, processes, links, protocol, trees=True),
        )
    )


def _nodes(processes: int, links: Links) -> int:
    if processes > links.node and processes % links.node:
        raise ValueError(f"{processes} processes do not fill nodes of {links.node}: give a multiple of {links.node}")
    return max(1, processes // links.node)
