"""Denoising under transformers' Trainer, whose checkpoints hold the plain model and nothing of ours."""

from pathlib import Path

import torch
from transformers import TrainerCallback

FILE = "denoising.pt"


class KeepDenoising(TrainerCallback):
    """Keeps the denoising weights beside each checkpoint, and restores them when training resumes from one.

    ``Trainer(..., callbacks=[dndetr.hf.KeepDenoising()])``. Without it a resumed run starts with new denoising weights.
    """

    def on_save(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            torch.save(model.denoising.state_dict(), self._path(args, state))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            return
        path = self._path(args, state)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, so denoising cannot resume: copy it there, or leave KeepDenoising out"
            )
        model.denoising.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    @staticmethod
    def _path(args, state) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
