"""What a run needs of memory, in its log, and the batch size that fits into it."""

import resource
import sys
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from datasets import IterableDataset
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_diffusion_rank.data.ranked_rows import image_counts
from trl_diffusion_rank.trainers.sharding import uses_fsdp


GB = 1e9


class PeakMemory(TrainerCallback):
    """
    Adds the main process's peak of memory since its start to each log: `memory/peak_gb` on a GPU, what PyTorch
    has handed out there, and elsewhere `memory/peak_rss_gb`; in units of 10^9 bytes.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs,
    ) -> None:
        # `logs` is for the callbacks after this one, the history has its own copy already
        for entry in (logs, state.log_history[-1]):
            entry |= peak_memory()


def peak_memory() -> dict[str, float]:
    """This process's peak of memory, by its name in the log."""
    if torch.cuda.is_available():
        return {"memory/peak_gb": round(torch.cuda.max_memory_allocated() / GB, 3)}
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage: bytes on macOS, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"memory/peak_rss_gb": round(peak / GB, 3)}


class FindBatchSizeMixin:
    """
    `auto_find_batch_size`: the largest per-device batch that fits, found before training.

    Transformers looks for it while it trains: out of memory, it starts again with fewer rows a step, from the first
    step but with the weights it has come to. Here the rows with the most images go forward and backward once, and what
    a device can't take at a time is made up by `gradient_accumulation_steps`: a step has the same rows, and the run
    differs by rounding alone.

    Comes before TRL's trainer among the bases; a trainer adds `_probe_loss`.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.auto_find_batch_size:
            self._find_batch_size()
        return super().train(*args, **kwargs)

    def _probe_loss(self, inputs: dict[str, Any]) -> Tensor:
        """A scalar that needs the memory of a step, and waits for no other process: one may run out of it alone."""
        raise NotImplementedError

    def _find_batch_size(self) -> None:
        args = self.args
        asked = args.per_device_train_batch_size
        sizes = iter([size for size in range(asked - 1, 0, -1) if asked % size == 0])  # others would change a step

        def smaller() -> int:
            size = next(sizes, None)
            if size is None:
                raise RuntimeError(
                    "`auto_find_batch_size`: not even one row, of those with the most images, fits into memory. "
                    "Turn on `gradient_checkpointing`, train in `bf16`, or lower `resolution`."
                )
            return size

        chosen = find_executable_batch_size(self._try, asked, smaller)()
        args.per_device_train_batch_size = self._train_batch_size = chosen
        args.gradient_accumulation_steps *= asked // chosen
        args.auto_find_batch_size = False  # it is found; Transformers would go on looking
        self.accelerator.print(
            f"`auto_find_batch_size`: {chosen} of {asked} rows fit on a device at a time; with "
            f"`gradient_accumulation_steps={args.gradient_accumulation_steps}` a step has as many rows as before."
        )

    def _try(self, batch_size: int) -> int:
        """The batch size, where the largest batch fits on all processes; else all run out of memory together."""
        failed = torch.zeros((), device=self.args.device)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # dropout would draw from the run's numbers
            try:
                self._largest_step(batch_size)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
                failed += 1
        self.model.zero_grad(set_to_none=True)
        if self.accelerator.reduce(failed, "sum"):
            raise torch.OutOfMemoryError(f"{batch_size} rows are out of memory.")  # Accelerate looks for these words
        return batch_size

    def _largest_step(self, batch_size: int) -> None:
        dataset = self.train_dataset
        counts = np.array(image_counts(dataset, "ranks" if "ranks" in dataset.column_names else "images"))
        rows = np.argsort(-counts, kind="stable")[:batch_size]
        self.model.train()
        batch = self._prepare_inputs(self.data_collator([dataset[int(row)] for row in rows]))
        self._probe_loss(batch).backward()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # AdamW will keep two tensors of each weight, and DDP gathers gradients in a third
        kept = [torch.zeros_like(parameter) for parameter in trained for _ in range(3)]
        del kept


def check_batch_size_can_be_found(args: TrainingArguments, train_dataset: Any) -> None:
    """Raise `ValueError` where `auto_find_batch_size` is set and can't be had."""
    if not args.auto_find_batch_size:
        return
    if args.deepspeed_plugin is not None or uses_fsdp(args):
        reason = "DeepSpeed or FSDP, whose need of memory shows only in training"
    elif isinstance(train_dataset, IterableDataset):
        reason = "a stream, of which nobody knows the row with the most images"
    else:
        return
    raise ValueError(
        f"`auto_find_batch_size=True` can't be used with {reason}. Leave it out, and lower "
        "`per_device_train_batch_size` by hand."
    )
