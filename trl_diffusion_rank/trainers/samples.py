"""Pictures of what a model draws while it is trained."""

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from trl_diffusion_rank.diffusion.draws import stable_seed
from trl_diffusion_rank.diffusion.sampling import TrainingSampler
from trl_diffusion_rank.evaluation.grid import image_grid
from trl_diffusion_rank.files import replace_file
from trl_diffusion_rank.trainers.callbacks import MovingAverage


logger = logging.getLogger(__name__)

FOLDER, RECORD = "samples", "samples.json"


class SampleGrids(TrainerCallback):
    """
    A grid of images of the same prompts and seeds before the first step, every `sample_steps` and at the end.

    On disk as `samples/step-000100.png`, beside them `samples/samples.json` says how they were drawn and at which
    steps; and to TensorBoard, Weights & Biases and Trackio where they are on. A grid is drawn when the next step
    begins: by then all that belongs to the last one is done. For the main process: the others wait for it in their
    next step. Nothing of training changes, neither the state of the random number generators nor a module's mode; a
    lack of memory or of disk is warned of.

    Has to stand before the trackers' callbacks, which close what they write to when training ends.

    Args:
        sampler ([`TrainingSampler`]): of the `prompts`.
        prompts (`list[str]`): the columns.
        args: a trainer's config.
        accelerator (`Accelerator`): the trainer's, which knows how training is cast.
        average ([`MovingAverage`] or None): what is drawn with instead of the weights themselves.
        callbacks (`list[TrainerCallback]`): the trainer's, among them the trackers'.
    """

    def __init__(
        self,
        sampler: TrainingSampler,
        prompts: list[str],
        args: Any,
        accelerator: Accelerator,
        average: MovingAverage | None,
        callbacks: list[TrainerCallback],
    ):
        self.sampler, self.accelerator, self.average, self.callbacks = sampler, accelerator, average, callbacks
        self.every, self.batch_size = args.sample_steps, args.per_device_train_batch_size
        self.folder = Path(args.output_dir) / FOLDER
        rows = range(args.samples_per_prompt)
        self.record: dict[str, Any] = {
            "prompts": prompts,
            # Row after row of the grid
            "seeds": [stable_seed(args.seed, "sample", prompt, row) for row in rows for prompt in prompts],
            "num_inference_steps": args.sample_inference_steps,
            "guidance_scale": args.sample_guidance_scale,
            "steps": [],
        }
        self._resumed_at = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._resumed_at, self.record["steps"] = state.global_step, []
        path = self.folder / RECORD
        if state.global_step and path.is_file():
            earlier = json.loads(path.read_text())
            if {**earlier, "steps": []} == self.record:  # grids of other prompts would be no comparison
                self.record = earlier

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs,
    ) -> None:
        step = state.global_step
        is_there = step == self._resumed_at and step in self.record["steps"]
        if step % self.every == 0 and not is_there:
            self._draw(step, model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs,
    ) -> None:
        self._draw(state.global_step, model)  # with the weights that are left, maybe those of the best step

    def _draw(self, step: int, model: nn.Module) -> None:
        try:
            grid = self._grid(step, self._images(model))
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            logger.warning(f"The samples of step {step} weren't drawn, training goes on: out of memory. ({reason})")
            return
        try:
            self._write(step, grid)
        except OSError as error:
            logger.warning(f"The samples of step {step} weren't written, training goes on: {error}")
        self._track(step, grid)

    def _images(self, model: nn.Module) -> list[Image]:
        """All images of the grid, row after row."""
        seeds = self.record["seeds"]
        positions = [place % len(self.record["prompts"]) for place in range(len(seeds))]
        images: list[Image] = []
        with self._undisturbed(model), self.accelerator.autocast():
            for start in range(0, len(seeds), self.batch_size):
                batch = slice(start, start + self.batch_size)
                images += self.sampler.draw(positions[batch], seeds[batch])
        return images

    @contextlib.contextmanager
    def _undisturbed(self, model: nn.Module) -> Iterator[None]:
        """The model as it would be saved, in evaluation mode; then everything as it was."""
        # Gradient checkpointing needs no switch: without gradients diffusers doesn't do it
        device = self.accelerator.device
        modes = [(module, module.training) for module in self.sampler.denoiser.modules()]
        average = self.average.applied(model) if self.average is not None else contextlib.nullcontext()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), average:
            self.sampler.denoiser.eval()
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training

    def _grid(self, step: int, images: list[Image]) -> Image:
        prompts = self.record["prompts"]
        rows = [images[start : start + len(prompts)] for start in range(0, len(images), len(prompts))]
        labels = [f"step {step}", *[""] * (len(rows) - 1)]
        return image_grid(list(zip(labels, rows, strict=True)), prompts)

    def _write(self, step: int, grid: Image) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        grid.save(buffer, format="PNG")
        replace_file(self.folder / f"step-{step:06d}.png", buffer.getvalue())
        steps = sorted({*self.record["steps"], step})
        replace_file(self.folder / RECORD, json.dumps({**self.record, "steps": steps}, indent=2))
        self.record["steps"] = steps

    def _track(self, step: int, grid: Image) -> None:
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")
                callback.tb_writer.flush()
            elif isinstance(callback, WandbCallback):
                tracker = callback._wandb
                tracker.log({"samples": tracker.Image(grid), "train/global_step": step})
            elif isinstance(callback, TrackioCallback):
                tracker = callback._trackio
                tracker.log({"samples": tracker.Image(grid), "train/global_step": step})
