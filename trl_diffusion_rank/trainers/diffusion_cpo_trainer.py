import logging
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, DataCollator, TrainerCallback
from trl.experimental.cpo import CPOTrainer

from trl_diffusion_rank.objectives.reference_free import reference_free_loss
from trl_diffusion_rank.objectives.safeguards import anchor
from trl_diffusion_rank.trainers.diffusion_cpo_config import DiffusionCPOConfig
from trl_diffusion_rank.trainers.diffusion_trainer import DiffusionTrainerMixin, refuse
from trl_diffusion_rank.trainers.error_scale import RunningErrorScale


logger = logging.getLogger(__name__)

# An error divided by its own standard deviation differs between images by about 1, whatever the model
NORMALIZED_BETA = 10.0


class DiffusionCPOTrainer(DiffusionTrainerMixin, CPOTrainer):
    """
    Trainer for contrastive preference optimization of diffusion models on n ranked images a prompt, without a
    reference.

    The implicit reward of an image is `-beta / 2 * error`, from one forward pass; the loss is a likelihood of the
    ranking under these rewards plus behaviour cloning of the best images ([Contrastive Preference
    Optimization](https://huggingface.co/papers/2401.08417)). No reference is in memory and no pass is made for one.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from trl_diffusion_rank import DiffusionCPOConfig, DiffusionCPOTrainer

    >>> trainer = DiffusionCPOTrainer(
    ...     model="stabilityai/stable-diffusion-xl-base-1.0",
    ...     args=DiffusionCPOConfig("sdxl-ranked"),
    ...     train_dataset=load_dataset("my/ranked-images", split="train"),
    ...     peft_config=LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str`, [`~diffusers.DiffusionPipeline`] or `torch.nn.Module`):
            What to train: a Hub id or folder of a diffusers pipeline, a loaded pipeline, or its denoiser alone (with
            the pipeline as `processing_class`, or with a config that says where it was loaded from).
        args ([`DiffusionCPOConfig`], *optional*):
            Configuration; by default `DiffusionCPOConfig(f"{model_name}-CPO")`.
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
            As in [`~trl.experimental.cpo.CPOTrainer`]. `peft_config.target_modules` defaults to the attention
            projections; names and patterns are the denoiser's own.
    """

    _tag_names = ["trl", "trl-diffusion-rank", "cpo", "diffusion-cpo"]
    _name = "Diffusion CPO"  # the paper is the parent's

    def __init__(
        self,
        model: str | DiffusionPipeline | nn.Module,
        args: DiffusionCPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: DiffusionPipeline | None = None,
        model_init: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: None = None,
        quantization_config: BitsAndBytesConfig | None = None,
    ):
        no_logits = "a denoiser gives no logits; samples are judged by `evaluate`"
        refuse("data_collator", data_collator, "rows are collated as they are encoded")
        refuse("model_init", model_init, "images are encoded with the model that is trained, before training")
        refuse("preprocess_logits_for_metrics", preprocess_logits_for_metrics, no_logits)
        refuse("compute_metrics", compute_metrics, no_logits)
        if not isinstance(train_dataset, Dataset | IterableDataset):
            found = "none" if train_dataset is None else f"`{type(train_dataset).__name__}`"
            raise TypeError(f"`train_dataset` must be a `Dataset` or `IterableDataset`, got {found}.")

        # Model
        if args is None:
            name = model if isinstance(model, str) else type(model).__name__
            args = DiffusionCPOConfig(f"{name.rstrip('/').split('/')[-1]}-CPO")
        model, peft_config, train_dataset = self.set_up(
            model, processing_class, args, peft_config, train_dataset, quantization_config
        )
        if args.beta is None:
            args.beta = NORMALIZED_BETA if args.normalize_error else self.family.default_beta_reference_free
            source = "`normalize_error`'s" if args.normalize_error else f"the `{self.family.name}` family's"
            logger.info(f"`beta` is {source}, {args.beta:g}.")

        # Dataset
        train_dataset = self._prepare_dataset(train_dataset, None, args, "train")
        eval_dataset = self._prepare_eval_datasets(eval_dataset, args)
        if isinstance(train_dataset, IterableDataset):
            # As TRL's DPO does: Accelerate would concatenate batches of different shapes to hand them out
            args.accelerator_config.dispatch_batches = False

        # TRL refuses `model_init_kwargs` with a loaded model
        model_init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collator,
            train_dataset=_StandIn(train_dataset),
            eval_dataset=None if eval_dataset is None else _StandIn(eval_dataset),
            processing_class=self._pipeline.tokenizer,  # TRL asks it for a pad token, nothing else
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        args.model_init_kwargs = model_init_kwargs
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._error_scale: RunningErrorScale | None = None
        if args.normalize_error:
            self._error_scale = RunningErrorScale(self.family.num_train_timesteps, self.accelerator)
        self.finish_set_up()

    # Dataset

    def _prepare_eval_datasets(self, eval_dataset: Any, args: DiffusionCPOConfig) -> Any:
        """What `eval_dataset` may be (one dataset, a dict of them, the name of one, None), encoded."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            return eval_dataset
        if isinstance(eval_dataset, dict):
            return {name: self._prepare_dataset(dataset, None, args, name) for name, dataset in eval_dataset.items()}
        return self._prepare_dataset(eval_dataset, None, args, "eval")

    # Encodes a dataset that is given here, as the DPO trainer does
    def evaluate(
        self,
        eval_dataset: Dataset | IterableDataset | DatasetDict | dict[str, Dataset | IterableDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        eval_dataset = self._prepare_eval_datasets(eval_dataset, self.args)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # Replaces TRL's, which looks for logits among the metrics
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, None, None]:
        return super().prediction_step(model, self._prepare_inputs(inputs), True, ignore_keys)

    # Loss

    # Replaces log-probabilities of tokens by denoising errors of images
    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: Literal["train", "eval"] = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        ranks, mask = batch["ranks"], batch["mask"]  # (B, n)
        asked, target = self._noised(batch, self._visit(train_eval))
        error, answer = self._ask(model, asked, target, mask)  # (B, n)
        scale = self._scale(error.detach(), asked[1], mask, train_eval)  # (B, n)

        def loss_of(error: Tensor) -> Tensor:
            per_row = reference_free_loss(
                self.loss_type,
                error / scale,
                ranks,
                mask,
                beta=self.beta,
                cpo_alpha=self.cpo_alpha,
                simpo_gamma=self.args.simpo_gamma,
                label_smoothing=self.label_smoothing,
                psi=batch["psi"].float(),
            )
            return per_row.mean()

        loss = self._preserving(loss_of, error, answer, ranks, mask)
        loss, adversarial = self._with_adversary(loss, answer, batch, train_eval)
        error = error.detach()
        cloning = {"nll_loss": anchor(error / scale, ranks, mask, self.beta)}
        self._store_metrics(train_eval, error, -0.5 * self.beta * error / scale, ranks, mask, cloning)
        return loss, adversarial  # which an evaluation leaves out

    def _trls_metrics(self, mode: str, name: str) -> list[float]:
        return self._stored_metrics[mode][f"eval_{name}" if mode == "eval" else name]

    def _scale(self, error: Tensor, timesteps: Tensor, mask: Tensor, mode: str) -> Tensor:
        """What errors (B, n) are divided by, from the timesteps (M,) of the images: 1 without `normalize_error`."""
        scale = torch.ones_like(error)
        if self._error_scale is None:
            return scale
        if mode == "train":
            self._error_scale.update(error[mask], timesteps)
        return scale.masked_scatter(mask, self._error_scale.at(timesteps))

    # Checkpoints

    # Adds the state of `normalize_error`
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._error_scale is not None and self.args.should_save:
            self._error_scale.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._error_scale is not None and checkpoint is not None:
            self._error_scale.load(checkpoint)


class _StandIn:
    """
    In the place of a dataset while TRL is set up: it maps three functions of texts over its datasets, which would
    write all latents three times, and in a way that streams and dicts of datasets don't have.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # a stream has none, for which Trainer asks `max_steps`

    def map(self, *args, **kwargs) -> "_StandIn":
        return self
