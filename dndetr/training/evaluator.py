"""The evaluation of a run: average precision and matching instability of the weights that it would be used with."""

import torch
from torch import nn

from ..analysis.instability import PROBED, MatchingProbe
from ..batch import Batch
from ..config import Config
from ..data.training import TrainingData
from ..denoising import NoisedQueries
from ..models.dn_detr import Predictions
from ..ops import CostWeights
from ..scoring.coco import Evaluation, coco_evaluate, detect
from ..scoring.results import Results
from .distributed import Processes
from .memory import explain_memory


class Evaluator:
    """Scores a model, the moving average where there is one, on the validation images; processes share the images.

    cost: weights of the training's matching, whose changes from one evaluation to the next ``matching`` counts.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TrainingData,
        config: Config,
        precision: torch.dtype,
        processes: Processes,
        cost: CostWeights,
    ):
        self.model, self.data, self.config = model, data, config
        self.precision, self.processes = precision, processes
        self.matching = MatchingProbe(cost, PROBED // processes.world)

    def infer(self, batch: Batch, noised: NoisedQueries | None = None) -> Predictions:
        """All layers' predictions, in float32, on the device; who asks in the middle of an epoch changes nothing."""
        training = self.model.training
        self.model.eval()
        try:
            with explain_memory([batch], self.config, lambda slots: 0):
                return self.model.infer(batch, self.precision, noised)
        finally:
            self.model.train(training)

    def __call__(self, epoch: int) -> Evaluation | None:
        """The evaluation after so many epochs; the first process has the result, the others None."""
        # Statistics of a batch norm are of each process's images; those of the first are saved, and so are scored.
        self.processes.align(self.model.buffers())
        predict = self.matching.watch(self.infer)
        found, seen = detect(predict, self.data.validation(), self.data.classes, self.config.detections)
        columns = [self.processes.join(torch.from_numpy(column)) for column in found.columns]
        image_ids = self.processes.join(torch.tensor(seen, dtype=torch.int64))
        matches = self.processes.gather(self.matching.fresh)
        if not self.processes.first:
            return None
        results, image_ids = Results(*(column.numpy() for column in columns)), sorted(image_ids.tolist())
        for some in matches:
            self.matching.fresh |= some
        metrics = coco_evaluate(self.data.val_records, results, image_ids, self.config.fast_eval)
        return Evaluation(metrics | self.matching.finish(epoch), results, image_ids)
