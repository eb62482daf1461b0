"""Training by many processes as events that are taken one by one in the order of their times: slow, by definition."""

import heapq
import itertools

import numpy as np
from all_reduce import Links, all_reduce
from scale_simulator import Loader, Saving, Stragglers, Work, opening


class Play:
    """The draws of ``scale_simulator.simulate``, and every event of every process, one at a time."""

    def __init__(self, work: Work, processes: int, links: Links, stragglers: Stragglers, loader: Loader, total: int):
        draw = np.random.default_rng(0)
        self.slower = np.exp(stragglers.spread * draw.standard_normal((total, processes)))
        self.paused = stragglers.pause * (draw.random((total, processes)) < stragglers.rare)
        spread = draw.standard_normal((total, work.batches, processes, work.images))
        self.making = (loader.median * np.exp(loader.spread * spread)).sum(axis=-1).reshape(-1, processes)
        self.work, self.processes, self.links, self.loader, self.total = work, processes, links, loader, total
        self.events, self.order, self.now = [], itertools.count(), 0.0

    def at(self, time: float, what, *arguments) -> None:
        heapq.heappush(self.events, (time, next(self.order), what, arguments))

    def run(self, saving: Saving, warm: int) -> list[float]:
        """When each step has ended for all processes, the first one's saving included."""
        self.saving, self.warm, self.ended = saving, warm, []
        self.jobs = [[[] for _ in range(self.loader.workers)] for _ in range(self.processes)]  # batches to make
        self.busy = [[False] * self.loader.workers for _ in range(self.processes)]
        self.finished = [set() for _ in range(self.processes)]
        self.wanted = [0] * self.processes  # the batch that is taken next
        self.asking = [False] * self.processes
        for process in range(self.processes):
            for batch in range(self.loader.workers * self.loader.ahead):
                self.hand(process, batch)
        self.begin_step(0, [0.0] * self.processes)
        while self.events:
            self.now, _, what, arguments = heapq.heappop(self.events)
            what(*arguments)
        return self.ended

    def hand(self, process: int, batch: int) -> None:
        if batch < len(self.making):
            worker = batch % self.loader.workers
            self.jobs[process][worker].append(batch)
            self.work_on(process, worker)

    def work_on(self, process: int, worker: int) -> None:
        if not self.busy[process][worker] and self.jobs[process][worker]:
            self.busy[process][worker] = True
            batch = self.jobs[process][worker].pop(0)
            self.at(self.now + self.making[batch, process], self.made, process, worker, batch)

    def made(self, process: int, worker: int, batch: int) -> None:
        self.busy[process][worker] = False
        self.finished[process].add(batch)
        self.work_on(process, worker)
        self.take(process)

    def begin_step(self, step: int, free: list[float]) -> None:
        self.step, self.there = step, 0
        for process, time in enumerate(free):
            self.at(time, self.ask, process)

    def ask(self, process: int) -> None:
        self.asking[process] = True
        self.take(process)

    def take(self, process: int) -> None:
        while self.asking[process] and self.wanted[process] in self.finished[process]:
            self.hand(process, self.wanted[process] + self.loader.workers * self.loader.ahead)
            self.wanted[process] += 1
            if self.wanted[process] == (self.step + 1) * self.work.batches:
                self.asking[process] = False
                self.there += 1
                if self.there == self.processes:
                    self.at(self.now + opening(self.work, self.processes, self.links), self.compute)

    def compute(self) -> None:
        self.begun, self.sent, self.line_free = self.now, 0, self.now
        self.missing = [self.processes] * len(self.work.buckets)
        for process in range(self.processes):
            for bucket, ready in enumerate(self.work.ready):
                lasts = self.paused[self.step, process] + self.slower[self.step, process] * ready
                self.at(self.now + lasts, self.whole, bucket)

    def whole(self, bucket: int) -> None:
        self.missing[bucket] -= 1
        while self.sent < len(self.missing) and self.missing[self.sent] == 0:
            self.line_free = max(self.line_free, self.now) + all_reduce(
                self.work.buckets[self.sent], self.processes, self.links
            )
            self.sent += 1
        if self.sent == len(self.missing) and self.missing[bucket] == 0:
            self.at(self.line_free, self.update)

    def update(self) -> None:
        free = []
        for slower, paused in zip(self.slower[self.step], self.paused[self.step], strict=True):
            by_itself = self.begun + paused + slower * self.work.whole
            free.append(max(self.now + slower * self.work.update, by_itself))
        if (self.step + 1 - self.warm) % self.saving.every == 0:
            free[0] += self.saving.seconds
        self.ended.append(max(free))
        if self.step + 1 < self.total:
            self.begin_step(self.step + 1, free)
