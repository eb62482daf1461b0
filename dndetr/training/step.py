"""One optimisation step, from batches on the device to updated weights, without asking the device for a number."""

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..batch import Batch
from ..config import DenoisingConfig
from ..denoising import Noise, NoisedQueries, draw_noise, noised_queries
from ..ops import images_of
from .criterion import Criterion, Losses
from .distributed import Processes
from .loss_window import Record
from .lowered import Lowered
from .noise_meter import NoiseMeter
from .optim import Schedule, WeightAverage
from .transfer import Transfer, layout_of, unpack


class TrainStep:
    """noise -> forward -> matching and losses -> backward -> clip -> AdamW -> schedule -> moving average.

    denoising: how noised queries are made, if any; precision: dtype of autocast (float32: none); noise_generator: a
    generator on the host, where noise is drawn to travel with its batch; processes: those that share the step, each
    with batches of its own; noise_meter: told of all noise that is drawn; say: is told what users should know.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        average: WeightAverage | None,
        record: Record,
        classes: int,
        denoising: DenoisingConfig,
        clip_norm: float,
        precision: torch.dtype,
        noise_generator: torch.Generator,
        processes: Processes,
        noise_meter: NoiseMeter | None = None,
        say: Callable[[str], None] = warnings.warn,
    ):
        self.model, self.criterion = model, criterion
        self.optimizer, self.schedule, self.average, self.record = optimizer, schedule, average, record
        self.classes, self.denoising = classes, denoising
        self.clip_norm, self.precision = clip_norm, precision
        self.noise_generator = noise_generator
        self.processes, self.noise_meter, self.say = processes, noise_meter, say
        self._capped = False  # was said
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self._trained[0].device
        # Several processes average gradients while backward is still running; those of lowered weights come at its end.
        lowers = self.on_device and precision != torch.float32 and processes.world == 1
        self._called = Lowered(model, precision) if lowers else model
        self._shared = DistributedDataParallel(model, gradient_as_bucket_view=True) if processes.world > 1 else None
        if self.on_device:
            # Learning rates and the average's share, where a captured step can read them.
            self._numbers = torch.zeros(len(optimizer.param_groups) + 1, device=self.device)
            self.transfer = Transfer(self.device)
            self.schedule.set(self._numbers.unbind()[:-1])

    @property
    def on_device(self) -> bool:
        """Whether batches must travel to where the model is."""
        return self.device.type != "cpu"

    def draw(self, batch: Batch) -> Noise | None:
        """Fresh noise for a batch on the host; None where denoising is off."""
        groups, room = self._groups_of(batch), batch.targets.labels.shape[1]
        wanted = self.denoising.groups_wanted(room)
        if groups < wanted and not self._capped:
            self._capped = True
            self.say(
                f"a batch with room for {room} objects per image gets {groups} denoising groups instead of {wanted} "
                f"(--denoising.max-queries {self.denoising.max_queries})"
            )
        if groups == 0:
            return None
        if batch.noise_seed is not None:
            self.noise_generator.manual_seed(batch.noise_seed)
        return draw_noise(batch.targets, groups, self.classes, self.noise_generator, self.denoising.contrastive)

    def preview(self, batch: Batch) -> NoisedQueries | None:
        """The denoising queries that the next step is about to make of its first batch."""
        state = self.noise_generator.get_state()
        noised = self.noised(batch, self.draw(batch))
        self.noise_generator.set_state(state)
        return noised

    def noised(self, batch: Batch, noise: Noise | None) -> NoisedQueries | None:
        """The denoising queries that the noise makes of a batch."""
        if noise is None:
            return None
        how = self.denoising
        return noised_queries(
            batch.targets, noise, how.label_noise, how.box_noise, how.padding == "official", how.contrastive
        )

    def __call__(self, *batches: Batch) -> tuple[Losses, Tensor]:
        """Train on the host's batches together, as if they were one -> detached losses, gradient norm before clipping.

        The loss is divided by the number of objects of all batches of all processes, so how images are divided into
        batches changes neither loss nor gradient. The losses are the sum over the batches (which, averaged over the
        processes, is the loss of them all). They stay on the device, where the record has them too.
        """
        numbers = [*self.schedule.rates(), 0.0 if self.average is None else self.average.weight()]
        noise = [self.draw(batch) for batch in batches]
        if self.on_device:
            tensors = [torch.tensor(numbers)]
            for batch, its_noise in zip(batches, noise, strict=True):
                tensors += [*batch.tensors(), *(its_noise or ())]
            result = self.run(tensors, batches)
        else:
            self.schedule.set(numbers[:-1])
            result = self.compute(batches, noise, numbers[-1])
        self.schedule.advance()
        if self.average is not None:
            self.average.updates += 1
        return result

    def run(self, tensors: list[Tensor], batches: Sequence[Batch]) -> tuple[Losses, Tensor]:
        """A step on the device; tensors on the host: the step's numbers, then each batch's and its noise."""
        return self.compute_arrived(unpack(self.transfer(tensors), layout_of(tensors)), batches)

    def compute_arrived(self, arrived: list[Tensor], batches: Sequence[Batch]) -> tuple[Losses, Tensor]:
        """``compute`` from ``run``'s tensors on the device; ``batches`` only say how they belong together."""
        self._numbers.copy_(arrived[0])
        rest = iter(arrived[1:])
        pairs = [(batch.with_tensors(rest), self._noise_from(rest, batch)) for batch in batches]
        return self.compute(*zip(*pairs, strict=True), self._numbers[-1])

    def compute(
        self, batches: Sequence[Batch], noise: Sequence[Noise | None], share: float | Tensor
    ) -> tuple[Losses, Tensor]:
        """All that happens on the device; noise: that of each batch; share: of the model's weights in the average."""
        objects = self._objects(batches)
        noised = [self.noised(batch, its_noise) for batch, its_noise in zip(batches, noise, strict=True)]
        totals, parts, finite = [], [], []
        for number, (batch, queries) in enumerate(zip(batches, noised, strict=True), start=1):
            with self._unshared() if number < len(batches) else contextlib.nullcontext():
                losses = self._backward(batch, queries, objects)
            totals.append(losses.total.detach())
            parts.append(losses.parts.detach())
            finite.append(losses.matches.finite)
        norm = nn.utils.clip_grad_norm_(self._trained, self.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, share)
        for batch, queries in zip(batches, noised, strict=True):
            if queries is not None and self.noise_meter is not None:
                self.noise_meter.add(queries, batch.targets)
        losses = Losses(_added(totals), _added(parts), losses.matches)
        self.record.write(losses, norm, torch.cat(finite, dim=1) if len(finite) > 1 else finite[0])
        return losses, norm

    def settle(self, batch: Batch) -> None:
        """Take a batch forward and back for nothing, so that gradients travel alike from the first step on.

        DistributedDataParallel puts gradients into buckets in the order in which the first backward makes them, and
        from then on adds up others together, in another order: a run that goes on would differ in its last digits from
        one that was never stopped. Random generators move on; weights and buffers stay.
        """
        if self._shared is None:
            return
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        noise, batch = self.draw(batch), batch.to(self.device)
        noise = None if noise is None else Noise(*(numbers.to(self.device) for numbers in noise))
        self._backward(batch, self.noised(batch, noise), torch.ones((), device=self.device))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def changed(self) -> list[Tensor]:
        """All that a step changes on the device."""
        models = [self.model] if self.average is None else [self.model, self.average.model]
        tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        tensors += [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        tensors += self.record.tensors()
        return tensors if self.noise_meter is None else [*tensors, self.noise_meter.sums]

    def epoch_ended(self) -> None:
        """Say what users should know of how the steps so far ran."""

    def state(self) -> dict:
        """What a checkpoint keeps of the optimiser; the same in every mode and on every device."""
        optimizer = self.optimizer.state_dict()
        for group, rate in zip(optimizer["param_groups"], self.schedule.rates(), strict=True):
            group |= {"lr": rate, "capturable": False}
        return {
            "optimizer": optimizer,
            "scheduler": {"done": self.schedule.done},
            "ema_updates": 0 if self.average is None else self.average.updates,
        }

    def restore(self, state: dict) -> None:
        """The inverse of ``state``."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.done = state["scheduler"]["done"]
        if self.average is not None:
            self.average.updates = state["ema_updates"]
        if self.on_device:
            self.schedule.set(self._numbers.unbind()[:-1])
            for group in self.optimizer.param_groups:
                group["capturable"] = self.device.type == "cuda"

    def _groups_of(self, batch: Batch) -> int:
        return self.denoising.groups_for(batch.targets.labels.shape[1])

    def _noise_from(self, tensors: Iterator[Tensor], batch: Batch) -> Noise | None:
        return Noise(*itertools.islice(tensors, len(Noise._fields))) if self._groups_of(batch) else None

    def _objects(self, batches: Sequence[Batch]) -> Tensor:
        """What normalises the losses: objects in all batches of all processes, per process (DDP takes the mean)."""
        counts = _added([batch.targets.counts.sum() for batch in batches])
        objects = self.processes.sum(counts.float()).clamp(min=1)
        return objects if self.processes.world == 1 else objects / self.processes.world

    def _backward(self, batch: Batch, noised: NoisedQueries | None, objects: Tensor) -> Losses:
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            predictions = (self._shared or self._called)(images_of(batch), batch.sizes, noised)
        losses = self.criterion(predictions, batch.targets, objects)
        total = losses.total
        if self._shared is not None:
            # Processes wait for each other's gradient of every weight.
            for weight in self._idle(noised):
                total = total + 0 * weight.sum()
        total.backward()
        return losses

    def _idle(self, noised: NoisedQueries | None) -> list[Tensor]:
        """The weights that a step has no use for: of noise where there is none, of later layers where there is one."""
        idle = [] if noised is not None else self.model.queries.of_noise()
        decoder = self.model.decoder
        if len(decoder.layers) == 1 and decoder.query_scale is not None:
            idle += decoder.query_scale.parameters()
        return idle

    def _unshared(self) -> contextlib.AbstractContextManager:
        """Gradients only add up within: they travel with the last batch's."""
        return contextlib.nullcontext() if self._shared is None else self._shared.no_sync()


def _added(tensors: list[Tensor]) -> Tensor:
    """Their sum, not begun with a zero: on a GPU each addition is a kernel."""
    return functools.reduce(torch.add, tensors)
