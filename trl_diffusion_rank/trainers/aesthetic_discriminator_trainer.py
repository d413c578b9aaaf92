import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import RewardTrainer

from trl_diffusion_rank.data.artefact import public
from trl_diffusion_rank.data.caption_groups import COLUMNS, CaptionGroupCollator, Equalizer, middle, read_groups
from trl_diffusion_rank.discriminator import (
    AestheticDiscriminator,
    AestheticDiscriminatorConfig,
    AestheticDiscriminatorProcessor,
)
from trl_diffusion_rank.discriminator.configuration import read_model_type
from trl_diffusion_rank.hub.cards import DISCRIMINATOR_FILES, discriminator_card, license_of
from trl_diffusion_rank.objectives.ranking import better_than, margins_of_pairs, mean_over
from trl_diffusion_rank.objectives.scorer import bce_loss, caption_negative_loss, group_loss
from trl_diffusion_rank.trainers.aesthetic_discriminator_config import (
    AestheticDiscriminatorTrainerConfig,
    read_trainable_layers,
)
from trl_diffusion_rank.trainers.callbacks import LogHistory
from trl_diffusion_rank.trainers.memory import FindBatchSizeMixin, PeakMemory, check_batch_size_can_be_found
from trl_diffusion_rank.trainers.publishing import PublishingMixin
from trl_diffusion_rank.trainers.sharding import check_sharding, loading_whole, uses_fsdp, uses_zero_3


DIGITS = "digits"  # as `model`, the small backbone of the digits world
# Options that belong to a discriminator's config, and so to a new one
NEW_HEAD = ("patch_layer", "head_hidden_size", "head_dropout", "text_conditioned")
# Options of TrainingArguments that the card shows beside the discriminator's own
_SHOWN = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps")


class AestheticDiscriminatorTrainer(FindBatchSizeMixin, PublishingMixin, RewardTrainer):
    """
    Trainer of an [`AestheticDiscriminator`] on caption groups: of the images of one caption, the real one shall win.

    The loss of a row is `group_loss + bce_weight * bce_loss + caption_negative_weight * caption_negative_loss`
    (`trl_diffusion_rank.objectives.scorer`). For one real and one generated image the first is TRL's Bradley-Terry.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_diffusion_rank import AestheticDiscriminatorTrainer, AestheticDiscriminatorTrainerConfig

    >>> trainer = AestheticDiscriminatorTrainer(
    ...     model="openai/clip-vit-large-patch14",
    ...     args=AestheticDiscriminatorTrainerConfig("my-discriminator", trainable_layers=4, patch_layer=12),
    ...     train_dataset=load_dataset("my/real-and-generated", split="train"),
    ... )
    >>> trainer.train()
    >>> trainer.save_model()  # a folder for `AestheticDiscriminator.from_pretrained` and the scorer `discriminator`
    ```

    A checkpoint holds what resuming reads, which for a LoRA is the adapter; `save_model` writes the whole
    discriminator, its LoRA merged, and the processor.

    Args:
        model (`str` or [`AestheticDiscriminator`]):
            A discriminator, the folder or Hub id of one, the folder or Hub id of a CLIP or SigLIP that a new one is
            built on, or `digits`, the small backbone of the digits world.
        args ([`AestheticDiscriminatorTrainerConfig`], *optional*):
            Configuration; by default `AestheticDiscriminatorTrainerConfig(f"{model_name}-Discriminator")`.
        data_collator (`DataCollator`, *optional*):
            Not needed: equalising belongs to the options. Passing one raises.
        train_dataset ([`~datasets.Dataset`]):
            Rows of `trl_diffusion_rank.data.caption_groups`. Held-out captions are for the caller to take out:
            `split_by_caption`.
        eval_dataset ([`~datasets.Dataset`] or `dict` of them, *optional*):
            Rows of other captions.
        processing_class ([`AestheticDiscriminatorProcessor`], *optional*):
            Needed only where `model` is a discriminator that was not loaded from a folder.
        compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics:
            As in [`~trl.RewardTrainer`]. The logits are (B, n), padded with NaN.
        quantization_config (*optional*):
            Passing one raises: a trained head reads the towers' last digits.
        peft_config ([`~peft.PeftConfig`], *optional*):
            A LoRA on the vision tower; `target_modules` defaults to its linear layers and `modules_to_save` to the
            head and the scale.
    """

    _tag_names = ["trl", "trl-diffusion-rank", "reward-trainer", "aesthetic-discriminator"]
    _name = "Aesthetic discriminator"

    published_files = DISCRIMINATOR_FILES

    def __init__(
        self,
        model: str | AestheticDiscriminator,
        args: AestheticDiscriminatorTrainerConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: AestheticDiscriminatorProcessor | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: None = None,
        peft_config: PeftConfig | None = None,
    ):
        if data_collator is not None:
            raise ValueError("`data_collator` can't be replaced: see `equalize_size` and its like. Leave it out.")
        if quantization_config is not None:
            raise ValueError("`quantization_config` can't be used with a discriminator's small towers. Leave it out.")
        if args is None:
            name = model if isinstance(model, str) else type(model).__name__
            args = AestheticDiscriminatorTrainerConfig(f"{name.rstrip('/').split('/')[-1]}-Discriminator")

        check_sharding(args)
        check_batch_size_can_be_found(args, train_dataset)
        if peft_config is not None and (uses_fsdp(args) or uses_zero_3(args)):
            raise ValueError(
                "A LoRA can't be merged where FSDP or DeepSpeed's ZeRO-3 splits the weights. Train without "
                "`peft_config`, or launch with `--accelerate_config multi_gpu` or `zero2`: a CLIP fits on one device."
            )

        # Model
        self.base_model = model if isinstance(model, str) else model.config.name_or_path
        set_seed(args.seed)  # a new head is drawn
        with loading_whole():
            model, processor = resolve_model(model, processing_class, args)
        for name in ("bos_token_id", "eos_token_id"):  # transformers would write them and warn of it
            setattr(model.config, name, getattr(processor.tokenizer, name))
        if peft_config is None:
            model.freeze_backbone(read_trainable_layers(args.trainable_layers))
        elif args.trainable_layers is not None:
            raise ValueError(
                f"`trainable_layers={args.trainable_layers!r}` and a LoRA both say what of the backbone is trained. "
                "Leave one of them out."
            )
        else:
            peft_config = _discriminator_peft_config(peft_config)

        # Data
        self._collators = {
            mode: CaptionGroupCollator(processor, args.real_source, args.equalize_size, jpeg, flip, args.seed)
            for mode, jpeg, flip in (
                ("train", args.equalize_jpeg, args.random_flip),
                ("eval", args.equalize_jpeg and (middle(args.equalize_jpeg),) * 2, False),
            )
        }
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collators["train"],
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor.tokenizer,  # TRL asks it for a pad token, nothing else
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
        )
        self.processing_class = processor
        self.add_callback(LogHistory())
        self.callback_handler.callbacks.insert(0, PeakMemory())  # before those that write the log
        self.report: dict[str, str] = {}  # heading -> text, what the card tells beside how to load

    # Dataset

    # Replaces tokenizing: images are decoded batch by batch
    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: AestheticDiscriminatorTrainerConfig,
        dataset_name: str,
    ) -> Dataset:
        return read_groups(dataset, dataset_name, args.real_source)

    # The columns that the collator reads instead of token ids
    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(COLUMNS)

    # Replaces the one collator of texts, which have no augmentation, by that of training or of evaluation
    def _get_dataloader(self, *args, is_training: bool = False, **kwargs) -> DataLoader:
        self.data_collator = self._collators["train" if is_training else "eval"]
        return super()._get_dataloader(*args, is_training=is_training, **kwargs)

    # Loss

    # Replaces the pair of a chosen and a rejected text by the n images of a caption
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        ranks, mask = inputs["ranks"], inputs["mask"]  # (B, n)
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("ranks", "mask")})
        scores = rows_of(outputs.logits.squeeze(1), mask)  # (B, n)
        real = (ranks == 1) & mask
        losses = {"group_loss": group_loss(scores, ranks, mask), "bce_loss": bce_loss(scores, real, mask)}  # (B,) each
        loss = losses["group_loss"] + self.args.bce_weight * losses["bce_loss"]
        if outputs.pair_scores is not None:
            # Of real images alone: whether a generated one shows its own caption is what nobody knows
            pairs = outputs.pair_scores  # (M, T)
            per_image = caption_negative_loss(pairs, inputs["caption_of"], torch.ones_like(pairs, dtype=torch.bool))
            losses["caption_loss"] = mean_over(rows_of(per_image, mask), real)
            own_is_best = (pairs.argmax(1) == inputs["caption_of"]).float()
            losses["caption_accuracy"] = mean_over(rows_of(own_is_best, mask), real)
            loss = loss + self.args.caption_negative_weight * losses["caption_loss"]
        self._store_metrics("train" if self.model.training else "eval", scores.detach(), ranks, mask, losses)
        if return_outputs:
            return loss.mean(), {"logits": scores.detach().masked_fill(~mask, float("nan"))}
        return loss.mean()

    def _probe_loss(self, inputs: dict[str, Tensor]) -> Tensor:
        outputs = self.model(**{name: value for name, value in inputs.items() if name not in ("ranks", "mask")})
        return outputs.logits.sum() if outputs.pair_scores is None else outputs.pair_scores.sum()

    def _store_metrics(
        self, mode: str, scores: Tensor, ranks: Tensor, mask: Tensor, losses: dict[str, Tensor]
    ) -> None:
        """Means over the rows of all processes, under TRL's names where it has one, for the next log."""
        better = better_than(ranks, mask)  # (B, n, n)
        margins = margins_of_pairs(scores)
        low, high = (scores.masked_fill(~mask, limit) for limit in (float("inf"), float("-inf")))
        is_top = high == high.amax(1, keepdim=True)
        per_row = {
            "accuracy": mean_over((margins > 0).float(), better),
            "margin": mean_over(margins, better),
            "mean_reward": mean_over(scores, mask),
            "min_reward": low.amin(1),
            "max_reward": high.amax(1),
            "top1": mean_over(((ranks == 1) & mask).float(), is_top),
            **{name: values.detach() for name, values in losses.items()},
        }
        values = self.accelerator.gather_for_metrics(torch.stack(list(per_row.values()), dim=1))  # (rows, metrics)
        for name, column in zip(per_row, values.T, strict=True):
            reduce = {"min_reward": torch.min, "max_reward": torch.max}.get(name, torch.mean)
            self._metrics[mode][name].append(reduce(column).item())

    # Scores

    def score(self, dataset: Dataset, equalize: Equalizer | None = None) -> list[np.ndarray]:
        """
        Scores of the images of every row, (n,) each, on all processes.

        Args:
            dataset: rows of caption groups.
            equalize: the path of the images; by default the one of evaluation, as training had it.
        """
        dataset = self._prepare_dataset(dataset, self.processing_class, self.args, "scored")
        own = self._collators["eval"]
        if equalize is not None:
            jpeg = equalize.jpeg and (equalize.jpeg, equalize.jpeg)
            self._collators["eval"] = replace(own, size=equalize.size, jpeg=jpeg)
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False  # it acts on evaluation too
        try:
            padded = self.predict(dataset).predictions  # (rows, n)
        finally:
            self._collators["eval"] = own
            self.args.dataloader_drop_last = drop_last
            self._metrics["eval"].clear()  # they belong to no evaluation
        counts = [len(images) for images in dataset.with_format("arrow")["images"]]
        return [row[:n].astype(np.float64) for row, n in zip(padded, counts, strict=True)]

    @property
    def evaluation_path(self) -> Equalizer:
        """How images come before the processor in evaluation."""
        return Equalizer(self.args.equalize_size, middle(self.args.equalize_jpeg))

    # Saving

    # Replaces the adapter of a language model by the whole discriminator: a scorer loads no adapters
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not is_peft_model(self.model) or folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            super()._save(output_dir, state_dict)
            return
        adapted, self.model = self.model, copy.deepcopy(self.model).merge_and_unload()
        try:
            super()._save(output_dir)  # `state_dict`, which DeepSpeed gives, isn't merged
        finally:
            self.model = adapted

    # Replaces TRL's card, which shows a text-classification pipeline
    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        if not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        shown = (*type(self.args).__annotations__, *_SHOWN)
        card = discriminator_card(
            name=self.hub_model_id or model_name or Path(self.args.output_dir).name,
            base_model=self.base_model,
            real_source=self.args.real_source,
            tags=[*self._tag_names, *tags],
            dataset=dataset_name,
            license=license_of(self.base_model) if self.args.push_to_hub else {},
            options={option: public(getattr(self.args, option)) for option in shown if option != "model_init_kwargs"},
            sections=self.report,
        )
        card.save(Path(self.args.output_dir) / "README.md")


def rows_of(values: Tensor, mask: Tensor) -> Tensor:
    """Values (M,) of the images that `mask` (B, n) has, in their places; 0 elsewhere. (B, n)"""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def resolve_model(
    model: str | AestheticDiscriminator,
    processor: AestheticDiscriminatorProcessor | None,
    args: AestheticDiscriminatorTrainerConfig,
) -> tuple[AestheticDiscriminator, AestheticDiscriminatorProcessor]:
    """The discriminator that is trained and the processor that goes with it."""
    if processor is not None and not isinstance(processor, AestheticDiscriminatorProcessor):
        raise TypeError(
            "`processing_class` must be an `AestheticDiscriminatorProcessor`, which has the image processor and the "
            f"tokenizer, got `{type(processor).__name__}`."
        )
    if isinstance(model, str):
        if model == DIGITS:
            from trl_diffusion_rank.digits.backbone import digits_backbone, digits_processor

            return AestheticDiscriminator.from_backbone(digits_backbone(), **_head(args)), digits_processor()
        if _is_discriminator(model):
            _refuse_new_head(args, model)
            loaded = AestheticDiscriminator.from_pretrained(model, dtype=torch.float32)
            return loaded, processor or AestheticDiscriminatorProcessor.from_pretrained(model)
        processor = processor or AestheticDiscriminatorProcessor.from_backbone(model)
        return AestheticDiscriminator.from_backbone(model, **_head(args)), processor
    if not isinstance(model, AestheticDiscriminator):
        raise TypeError(
            "`model` must be an `AestheticDiscriminator`, the folder or Hub id of one or of a CLIP or SigLIP, or "
            f"{DIGITS!r}, got `{type(model).__name__}`."
        )
    _refuse_new_head(args, "loaded already")
    if processor is None:
        if not model.config.name_or_path:
            raise ValueError(
                "`model` doesn't say where it was loaded from: pass its `AestheticDiscriminatorProcessor` as "
                "`processing_class`."
            )
        processor = AestheticDiscriminatorProcessor.from_pretrained(model.config.name_or_path)
    return model, processor


def _head(args: AestheticDiscriminatorTrainerConfig) -> dict[str, Any]:
    return {option: getattr(args, option) for option in NEW_HEAD}


def _refuse_new_head(args: AestheticDiscriminatorTrainerConfig, model: str) -> None:
    defaults = type(args).__dataclass_fields__
    for option, value in _head(args).items():
        if value != defaults[option].default:
            raise ValueError(
                f"`{option}={value!r}` is for a new discriminator, but `model` is one already ({model}). Leave it "
                "out, or give the backbone as `model`."
            )


def _is_discriminator(model: str) -> bool:
    try:
        return read_model_type(model) == AestheticDiscriminatorConfig.model_type
    except OSError:  # `from_backbone` says what is expected
        return False


def _discriminator_peft_config(config: PeftConfig) -> PeftConfig:
    """The user's config with what it leaves open."""
    if config.task_type not in (None, "CAUSAL_LM"):  # CAUSAL_LM is the default of TRL's ModelConfig
        raise ValueError(f"`lora_task_type={config.task_type!r}` has no meaning for a discriminator. Leave it unset.")
    return replace(
        config,
        task_type=None,
        target_modules=config.target_modules or AestheticDiscriminator.lora_target_modules,
        modules_to_save=config.modules_to_save or AestheticDiscriminator.modules_to_save,
    )
