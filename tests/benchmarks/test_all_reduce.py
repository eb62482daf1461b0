"""Seconds of an all-reduce: against a ring that is played through, by hand, and near what others measured."""

import math

import pytest
from all_reduce import H100S, INSTANT, LOW_LATENCY, SIMPLE, Links, Protocol, all_reduce, hierarchical, ring

MIB = 2**20


def bytes_sent_in_a_ring(processes: int) -> tuple[list[int], int]:
    """Shares that each process sends until all have the sum of all, and rounds, by passing them on."""
    held = [[{(share, process)} for share in range(processes)] for process in range(processes)]
    sent, rounds = [0] * processes, 0
    for turn in range(2 * (processes - 1)):
        moved = [(p, (p - turn) % processes) for p in range(processes)]
        parts = [set(held[p][share]) for p, share in moved]
        for (p, share), part in zip(moved, parts, strict=True):
            held[(p + 1) % processes][share] |= part
            sent[p] += 1
        rounds += 1
    complete = [{(share, process) for process in range(processes)} for share in range(processes)]
    assert held == [complete] * processes
    return sent, rounds


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_a_ring_sends_what_passing_shares_on_takes(processes):
    sent, rounds = bytes_sent_in_a_ring(processes)
    size, links = 8 * MIB, Links()
    expected = SIMPLE.start + rounds * SIMPLE.hop + max(sent) / processes * size / links.nvlink
    assert ring(size, processes, links, SIMPLE) == pytest.approx(expected, rel=1e-12)


def test_several_nodes_by_hand():
    """Two nodes of two: 3 MB, rates of 1 and 0.1 MB a second, a second to start, 10 and 100 for hops."""
    links, protocol = Links(node=2, nvlink=1e6, network=1e5), Protocol(1.0, 10.0, 100.0, 1.0)
    # A ring of 4 has 6 rounds, 4 of them over the network, and goes over both cards of a node.
    assert ring(3e6, 4, links, protocol) == pytest.approx(1 + 2 * 10 + 4 * 100 + 1.5 * 3e6 / 2e5)
    # Within a node there and back, a half each time; between the nodes each GPU has a half.
    inside = 1 + 2 * 10 + 1.5 + 1.5
    assert hierarchical(3e6, 4, links, protocol, trees=False) == pytest.approx(inside + 2 * 100 + 1.0 * 1.5e6 / 1e5)
    assert hierarchical(3e6, 4, links, protocol, trees=True) == pytest.approx(inside + 2 * 100 + 2.0 * 1.5e6 / 1e5)
    slow = protocol._replace(share=0.25)
    assert ring(3e6, 4, links, slow) - ring(0, 4, links, slow) == pytest.approx(4 * 22.5)


@pytest.mark.parametrize("processes", [2, 8])
def test_within_a_node_all_are_a_ring(processes):
    for trees in (False, True):
        assert hierarchical(MIB, processes, H100S, SIMPLE, trees) == pytest.approx(ring(MIB, processes, H100S, SIMPLE))


@pytest.mark.parametrize("size", [0, 4, 425_000, 25 * MIB, 2**30])
@pytest.mark.parametrize("processes", [8, 16, 64, 512])
def test_the_fastest_is_taken(size, processes):
    every = [
        seconds
        for protocol in (SIMPLE, LOW_LATENCY)
        for seconds in (
            ring(size, processes, H100S, protocol),
            *(hierarchical(size, processes, H100S, protocol, trees) for trees in (False, True)),
        )
    ]
    assert all_reduce(size, processes) == min(every) > 0


def test_alone_or_with_instant_links_it_is_nothing():
    assert all_reduce(MIB, 1) == 0 == all_reduce(MIB, 512, INSTANT)


@pytest.mark.parametrize(
    ("size", "processes", "seconds", "where"),
    [
        (2**30, 8, 2 * 7 / 8 * 2**30 / 370e9, "nccl-tests issue 212: 370 GB/s, ring"),
        (64 * MIB, 128, 2 * 127 / 128 * 64 * MIB / 150e9, "nccl issue 1469: 150 GB/s where it is normal"),
        (8, 128, 62e-6, "nccl issue 1469"),
    ],
)
def test_near_what_others_measured_on_h100s(size, processes, seconds, where):
    assert all_reduce(size, processes) == pytest.approx(seconds, rel=0.15), where


def test_whole_nodes_are_asked_for():
    with pytest.raises(ValueError, match="12 processes do not fill nodes of 8: give a multiple of 8"):
        all_reduce(MIB, 12)


def test_more_is_never_faster():
    for processes in (8, 64, 512):
        times = [all_reduce(size, processes) for size in (4, MIB, 25 * MIB, 2**30)]
        assert times == sorted(times) and all(map(math.isfinite, times))
    assert all_reduce(MIB, 8) < all_reduce(MIB, 64) < all_reduce(MIB, 512)
