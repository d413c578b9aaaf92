import contextlib
import copy
import functools
import logging
import math
import os
import textwrap
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, DataCollator, TrainerCallback
from trl import DPOTrainer

from trl_diffusion_rank.diffusion.denoiser import DenoiserModel
from trl_diffusion_rank.diffusion.draws import EVALUATION
from trl_diffusion_rank.objectives import monitors
from trl_diffusion_rank.objectives.ranking import ranking_loss
from trl_diffusion_rank.objectives.safeguards import anchor, dpop
from trl_diffusion_rank.trainers.adversarial import Answer
from trl_diffusion_rank.trainers.diffusion_trainer import DiffusionTrainerMixin, refuse
from trl_diffusion_rank.trainers.displacement import TOLERANCE, DisplacementMonitor
from trl_diffusion_rank.trainers.ranked_diffusion_dpo_config import RankedDiffusionDPOConfig
from trl_diffusion_rank.trainers.sharding import uses_fsdp


logger = logging.getLogger(__name__)

# More distinct draws cost more passes in advance; on the embedded world one was as good (benchmarks/reference.py)
MAX_DEFAULT_DRAWS = 8


class RankedDiffusionDPOTrainer(DiffusionTrainerMixin, DPOTrainer):
    """
    Trainer for Diffusion-DPO on n ranked images a prompt.

    The images of a row share one timestep and one noise sample; the implicit reward of an image is
    `beta / 2 * (ref_error - error)` with the mean squared denoising errors of the reference and of the trained model
    ([Diffusion Model Alignment Using Direct Preference Optimization](https://huggingface.co/papers/2311.12908)); the
    loss is a likelihood of the ranking under these rewards.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from trl_diffusion_rank import RankedDiffusionDPOConfig, RankedDiffusionDPOTrainer

    >>> trainer = RankedDiffusionDPOTrainer(
    ...     model="stabilityai/stable-diffusion-xl-base-1.0",
    ...     args=RankedDiffusionDPOConfig("sdxl-ranked"),
    ...     train_dataset=load_dataset("my/ranked-images", split="train"),
    ...     peft_config=LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str`, [`~diffusers.DiffusionPipeline`] or `torch.nn.Module`):
            What to train: a Hub id or folder of a diffusers pipeline, a loaded pipeline, or its denoiser alone (with
            the pipeline as `processing_class`, or with a config that says where it was loaded from).
        ref_model (`torch.nn.Module`, *optional*):
            A denoiser to use as the reference. By default the model as it is before training: with LoRA the disabled
            adapter, which costs no memory, else a frozen copy.
        args ([`RankedDiffusionDPOConfig`], *optional*):
            Configuration; by default `RankedDiffusionDPOConfig(f"{model_name}-RankedDPO")`.
        data_collator (`DataCollator`, *optional*):
            Not needed: the collator belongs to how rows are encoded. Passing one raises.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Ranked rows, in any of the formats of `trl_diffusion_rank.data.ranked_rows`. A stream needs `max_steps`.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            Ranked rows to evaluate on, with the same noise at every evaluation.
        processing_class ([`~diffusers.DiffusionPipeline`], *optional*):
            Turns prompts and images into tensors; needed only when `model` is a denoiser.
        quantization_config (`~transformers.BitsAndBytesConfig`, *optional*):
            Load the denoiser in 4 or 8 bits. Needs an accelerator, `bitsandbytes` and a `peft_config`.
        callbacks, optimizers, peft_config:
            As in [`~trl.DPOTrainer`]. `peft_config.target_modules` defaults to the attention projections; names and
            patterns are the denoiser's own.
    """

    needs_whole_weights = (*DiffusionTrainerMixin.needs_whole_weights, "stop_on_displacement")
    _tag_names = ["trl", "trl-diffusion-rank", "dpo", "diffusion-dpo"]
    _name = "Ranked Diffusion DPO"
    _paper = {
        "title": "Diffusion Model Alignment Using Direct Preference Optimization",
        "id": "2311.12908",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{wallace2024diffusion,
                title        = {{Diffusion Model Alignment Using Direct Preference Optimization}},
                author       = {Bram Wallace and Meihua Dang and Rafael Rafailov and Linqi Zhou and Aaron Lou and Senthil Purushwalkam and Stefano Ermon and Caiming Xiong and Shafiq Joty and Nikhil Naik},
                year         = 2024,
                booktitle    = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: str | DiffusionPipeline | nn.Module,
        ref_model: nn.Module | None = None,
        args: RankedDiffusionDPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: DiffusionPipeline | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        refuse("data_collator", data_collator, "rows are collated as they are encoded")
        refuse("compute_metrics", compute_metrics, "a denoiser gives no logits; samples are judged by `evaluate`")

        # Model
        if args is None:
            name = model if isinstance(model, str) else type(model).__name__
            args = RankedDiffusionDPOConfig(f"{name.rstrip('/').split('/')[-1]}-RankedDPO")
        model, peft_config, train_dataset = self.set_up(
            model, processing_class, args, peft_config, train_dataset, quantization_config
        )
        own_ref_model = ref_model is not None
        if own_ref_model:
            ref_model = DenoiserModel(ref_model, self.family)
        elif peft_config is None and (not args.precompute_ref_log_probs or uses_fsdp(args)):
            # TRL would load the reference from the Hub again, and as a language model
            ref_model = DenoiserModel(copy.deepcopy(model.denoiser), self.family)
        if ref_model is not None:
            ref_model.requires_grad_(False)
        if args.beta is None:
            family_beta = "default_beta_linear" if args.loss_type == ["linear"] else "default_beta"
            args.beta = getattr(self.family, family_beta)
            logger.info(f"`beta` is the `{self.family.name}` family's, {args.beta:g}.")

        self._displacement = DisplacementMonitor(args.displacement_patience)
        self._displaced_at: int | None = None
        self._good_weights: list[Tensor] | None = None

        # TRL warns that `model_init_kwargs` is ignored with a loaded model; it wasn't
        model_init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=self._collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self._pipeline.tokenizer,  # TRL asks it for a pad token, nothing else
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        args.model_init_kwargs = model_init_kwargs
        if args.precompute_ref_log_probs and not own_ref_model:
            self.ref_model = None  # FSDP's: everything was asked
        self.finish_set_up()

    # Loss

    # Replaces log-probabilities of tokens by denoising errors of images
    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        mode = "train" if self.model.training else "eval"
        ranks, mask = inputs["ranks"], inputs["mask"]  # (B, n)
        error, ref_error, answer = self._errors(model, inputs, mode)  # (B, n), (B, n)

        def loss_of(error: Tensor) -> Tensor:
            logps, ref_logps = -0.5 * error, -0.5 * ref_error
            rewards = self.beta * (logps - ref_logps)
            per_row = self.args.sft_weight * anchor(error, ranks, mask, self.beta)
            per_row = per_row + self.args.dpop_lambda * dpop(error, ref_error, ranks, mask, self.beta)
            for loss_type, weight in zip(self.loss_types, self.loss_weights, strict=True):
                per_row = per_row + weight * ranking_loss(
                    loss_type,
                    rewards,
                    ranks,
                    mask,
                    error=error,
                    psi=inputs["psi"].float(),
                    label_smoothing=self.label_smoothing,
                    linear_eta=self.args.linear_eta,
                )
            return per_row.mean()

        loss = self._preserving(loss_of, error, answer, ranks, mask)
        loss, adversarial = self._with_adversary(loss, answer, inputs, mode)
        rewards = -0.5 * self.beta * (error.detach() - ref_error)
        chosen_delta, rejected_delta = monitors.chosen_and_rejected(error.detach() - ref_error, ranks, mask)
        deltas = {"error/chosen_delta": chosen_delta, "error/rejected_delta": rejected_delta}
        self._store_metrics(mode, error.detach(), rewards, ranks, mask, deltas)
        for name, value in adversarial.items():
            self._metrics[mode][name].append(value)
        return loss

    def _errors(self, model: nn.Module, inputs: dict[str, Any], mode: str) -> tuple[Tensor, Tensor, Answer]:
        """
        Denoising errors of the trained model and of the reference, (B, n) each, 0 where the row is padded, and the
        trained model's answer.
        """
        mask = inputs["mask"]  # (B, n)
        visit = self._visit(mode)
        asked, target = self._noised(inputs, visit)
        if "ref_errors" in inputs:
            ref_error = inputs["ref_errors"][..., 0 if mode == "eval" else visit]  # (B, n, K) -> (B, n)
        else:
            # The reference first: the adapter is active again when the graph is built and checkpoints recompute
            ref_error = self._reference_error(asked, target, mask)
        error, answer = self._ask(model, asked, target, mask)
        return error, ref_error, answer

    # With `num_reference_draws` a row's draws repeat, so that their reference errors can be known in advance
    def _visit(self, mode: str) -> int:
        visit = super()._visit(mode)
        draws = self.args.num_reference_draws
        return visit % draws if draws and mode == "train" else visit

    @torch.no_grad()
    def _reference_error(self, asked: tuple, target: Tensor, mask: Tensor) -> Tensor:
        """Denoising errors of the reference, (B, n)."""
        with self._reference() as reference:
            return self._ask(reference, asked, target, mask)[0]

    # Replaces the log-probabilities of whole sequences
    def _precompute_ref_logps(self, dataset: Dataset | IterableDataset, name: str, batch_size: int) -> Dataset:
        """
        Add the column `ref_errors`: the reference's errors at all draws that a row will meet, n x K numbers.

        They are cached by a fingerprint of the data, the model's weights and the draws. Losses and betas aren't part
        of it, so a sweep over them asks the reference once.
        """
        if not self.cache_latents:
            raise ValueError(
                "`precompute_ref_log_probs=True` needs a dataset whose images are encoded once (`cache_latents`): "
                "a stream or `cache_latents=False` would encode every image again for each draw."
            )
        if "ref_errors" in dataset.column_names:
            return dataset
        if self.args.num_reference_draws is None:
            self.args.num_reference_draws = min(MAX_DEFAULT_DRAWS, self._number_of_visits(len(dataset)))
        visits = [EVALUATION] if name != "train" else list(range(self.args.num_reference_draws))
        drawn = (self.args.seed, visits, self.timestep_sampling, self.timestep_grid, self.resolution)
        drawn += (self.args.timestep_weighting, self.args.caption_dropout)
        made_of = (dataset._fingerprint, self._precompute_model_hash, drawn, self.accelerator.mixed_precision)
        fingerprint = [Hasher.hash(made_of)]
        broadcast_object_list(fingerprint, from_process=0)  # sharded weights have another hash on each process
        cache_file = dataset._get_cache_file_path(fingerprint[0])
        known = os.path.exists(cache_file)
        if not known:
            errors = self._all_reference_errors(dataset, name, visits, batch_size)
            if self.accelerator.is_main_process:
                dataset.select_columns(["row_seed"]).map(
                    lambda _, indices: {"ref_errors": [errors[index] for index in indices]},
                    with_indices=True,
                    batched=True,
                    remove_columns=["row_seed"],
                    features=Features({"ref_errors": List(List(Value("float32")))}),
                    new_fingerprint=fingerprint[0],
                    cache_file_name=cache_file,
                )
        self.accelerator.wait_for_everyone()
        self.accelerator.print(
            f"Reference errors of the {name} dataset, {len(visits)} draw{'s' if len(visits) > 1 else ''} a row: "
            f"{'found in the cache' if known else 'computed and cached'}."
        )
        return concatenate_datasets([dataset, Dataset.from_file(cache_file)], axis=1)

    def _number_of_visits(self, num_rows: int) -> int:
        """How often the run meets each of its `num_rows` rows, rounded up."""
        if self.args.max_steps <= 0:
            return max(1, math.ceil(self.args.num_train_epochs))
        rows_a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return max(1, math.ceil(self.args.max_steps * rows_a_step / num_rows))

    def _all_reference_errors(
        self, dataset: Dataset, name: str, visits: list[int], batch_size: int
    ) -> list[list[list[float]]]:
        """Errors [row][image][draw] in the dataset's order; the processes share the work and each gets all of it."""
        loader = self.accelerator.prepare(
            DataLoader(dataset, batch_size, collate_fn=self._collator, num_workers=self.args.dataloader_num_workers)
        )
        if self.ref_model is None:
            self.model.to(self.args.device)  # where DeepSpeed and FSDP would bring it when training begins
        rows = []
        for batch in tqdm(loader, desc=f"Reference errors of {name}", unit="batch"):
            batch = self._prepare_inputs(batch)
            mask = batch["mask"]
            errors = [self._reference_error(*self._noised(batch, visit), mask) for visit in visits]
            errors = self.accelerator.pad_across_processes(torch.stack(errors, dim=2), dim=1)  # (B, n, K)
            mask = self.accelerator.pad_across_processes(mask.int(), dim=1)
            errors, mask = self.accelerator.gather_for_metrics((errors, mask))
            rows += [row[present].tolist() for row, present in zip(errors.cpu(), mask.bool().cpu(), strict=True)]
        return rows

    @contextlib.contextmanager
    def _reference(self):
        """
        The reference: its own model, or the trained one with the adapter disabled; without either, the model itself
        before its first step. Diffusers checkpoints no gradients where none are asked for.
        """
        # Not PEFT's `disable_adapter`, which walks over all modules again and again: a fifth of a second for SDXL's
        layers = self._lora_layers if self.ref_model is None else []
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield self.ref_model or self.model
        finally:
            for layer in layers:
                layer._disable_adapters = False

    @functools.cached_property
    def _lora_layers(self) -> list[BaseTunerLayer]:
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    # Adds the watch for displacement
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._read_metrics()
        means = {}
        if self.model.training:  # what TRL is about to add, which has to be known before the entry is written
            means = {name: sum(values) / len(values) for name, values in self._metrics["train"].items()}
        if self._is_displaced({**logs, **means}):
            logs["displacement"] = 1.0
        super().log(logs, start_time)

    def _is_displaced(self, logs: dict[str, float]) -> bool:
        """Whether displacement is seen with these logs for the first time, which is warned of, or ends training."""
        if "error/chosen_delta" not in logs:
            return False
        chosen_rise = logs["error/chosen_delta"] / (logs["error/chosen"] - logs["error/chosen_delta"])
        if self.args.stop_on_displacement and (chosen_rise <= TOLERANCE or self._good_weights is None):
            self._good_step = self.state.global_step
            self._good_weights = [p.detach().to("cpu", copy=True) for p in self.model.parameters() if p.requires_grad]
        displaced = self._displacement.update(chosen_rise, logs["error/rejected_delta"])
        if not displaced or self._displaced_at is not None:
            return False
        self._displaced_at = self.state.global_step
        message = (
            f"Displacement at step {self.state.global_step}: over the last {self._displacement.patience} logs the "
            "denoising errors of the best and of the worst images both rose, the best ones' to "
            f"{1 + chosen_rise:.1f} times the reference's. The loss may still fall, but samples are getting worse."
        )
        if self.args.stop_on_displacement:
            trained = (p for p in self.model.parameters() if p.requires_grad)
            for parameter, good in zip(trained, self._good_weights, strict=True):
                parameter.data.copy_(good)
            self.control.should_training_stop = True
            logger.warning(
                f"{message} Training stops, with the weights of step {self._good_step}, the last log at which the "
                f"best images' error was less than {1 + TOLERANCE:g} times the reference's (`stop_on_displacement`)."
            )
        else:
            logger.warning(
                f"{message} Stop, go back to an earlier checkpoint, and lower `learning_rate` (now "
                f"{self.args.learning_rate:g}), raise `beta` (now {self.beta:g}), or hold the best images with "
                "`preserve_mu`, `sft_weight` or `dpop_lambda`; `stop_on_displacement` stops by itself."
            )
        return True
