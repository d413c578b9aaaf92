"""What the preference trainers of diffusion models share, whichever of TRL's trainers they extend."""

import contextlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend, is_peft_model
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from diffusers import DiffusionPipeline
from peft import PeftConfig
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from trl.trainer.utils import global_then_local_main_first, hash_module

from trl_diffusion_rank.data.collator import EncodedRowCollator, RawRowCollator
from trl_diffusion_rank.data.encoding import FORMAT_VERSION, encode_rows
from trl_diffusion_rank.data.images import to_pixels
from trl_diffusion_rank.data.ranked_rows import ROW_COLUMNS, check_rows, to_ranked
from trl_diffusion_rank.diffusion.denoiser import DenoiserModel, compile_blocks, denoising_error
from trl_diffusion_rank.diffusion.draws import EVALUATION, draw_captions, draw_rows
from trl_diffusion_rank.diffusion.families import recognise_family
from trl_diffusion_rank.diffusion.loading import load_pipeline
from trl_diffusion_rank.diffusion.sampling import TrainingSampler
from trl_diffusion_rank.diffusion.weighting import timestep_weights
from trl_diffusion_rank.hub.adapters import save_denoiser, save_lora
from trl_diffusion_rank.hub.cards import DiffusionCard, introduction, license_of
from trl_diffusion_rank.hub.comfy import SUFFIX, WEIGHTS, save_comfy_lora_if_possible
from trl_diffusion_rank.objectives import monitors
from trl_diffusion_rank.objectives.ranking import better_than
from trl_diffusion_rank.objectives.safeguards import preservation_scales, scale_gradient
from trl_diffusion_rank.trainers.adversarial import AdversarialTerm, Answer, load_discriminator
from trl_diffusion_rank.trainers.callbacks import LogHistory, MovingAverage, SkipNonFiniteSteps
from trl_diffusion_rank.trainers.memory import FindBatchSizeMixin, PeakMemory, check_batch_size_can_be_found
from trl_diffusion_rank.trainers.publishing import PublishingMixin
from trl_diffusion_rank.trainers.samples import SampleGrids
from trl_diffusion_rank.trainers.sharding import check_sharding, keep_buffers, loading_whole


logger = logging.getLogger(__name__)


class DiffusionTrainerMixin(FindBatchSizeMixin, PublishingMixin):
    """
    A denoiser in the place of a language model: loading, encoding, noise, errors, logs, files.

    Comes before TRL's trainer among the bases. A trainer calls [`set_up`] before its parent's `__init__`, which then
    runs whole, and [`finish_set_up`] after it.
    """

    published_files = ("README.md", WEIGHTS, f"*{SUFFIX}", "unet/*", "transformer/*", "discriminator/*", "samples/*")
    # Options that a split weight rules out
    needs_whole_weights: tuple[str, ...] = ("adversarial_adaptive", "sample_steps")

    def set_up(
        self,
        model: str | DiffusionPipeline | nn.Module,
        processing_class: DiffusionPipeline | None,
        args: Any,
        peft_config: PeftConfig | None,
        train_dataset: Dataset | IterableDataset | None,
        quantization_config: BitsAndBytesConfig | None,
    ) -> tuple[DenoiserModel, PeftConfig | None, Dataset | IterableDataset | None]:
        """
        Load what is trained and decide what the model's family decides.

        Returns the wrapped denoiser, the `peft_config` as it fits the wrapper, and the dataset with its images
        undecoded and under a name in which TRL doesn't see a vision-language dataset.
        """
        check_sharding(args, self.needs_whole_weights)
        check_batch_size_can_be_found(args, train_dataset)
        init_kwargs = _with_quantization(args.model_init_kwargs, quantization_config, model)
        with loading_whole():
            self._pipeline, denoiser = _resolve_model(model, processing_class, init_kwargs)
        self.family = recognise_family(self._pipeline)
        denoiser = denoiser or getattr(self._pipeline, self.family.denoiser_name)
        name_or_path = model if isinstance(model, str) else self._pipeline.config.get("_name_or_path") or ""
        for component in self.family.encoders.values():
            component.requires_grad_(False)
        self._encoder_hash: str | None = None
        if args.channels_last and self.family.denoiser_name != "unet":
            raise ValueError(
                "`channels_last=True` is a layout of convolutions, and the denoiser of the "
                f"`{self.family.name}` family is a transformer. Leave it out."
            )
        wrapped = DenoiserModel(denoiser, self.family, name_or_path)
        if peft_config is not None:
            peft_config = _denoiser_peft_config(peft_config, self.family.lora_target_modules)
        elif getattr(wrapped, "is_quantized", False):
            raise ValueError(
                "The weights of a quantized base can't be trained themselves: pass a `peft_config` (`--use_peft`), or "
                "leave the quantization out."
            )

        self.timestep_sampling = args.timestep_sampling or self.family.default_timestep_sampling
        self.timestep_grid = self.family.timestep_grid(self.timestep_sampling, args.timesteps)
        self.resolution = args.resolution or self.family.default_resolution
        if self.resolution % self.family.resolution_multiple:
            raise ValueError(
                f"`resolution={self.resolution}` must be a multiple of {self.family.resolution_multiple}, the scale "
                "of the model's VAE times the side of the denoiser's patches."
            )

        self._adversary: AdversarialTerm | None = None
        if args.adversarial_mode != "none":
            with loading_whole():
                discriminator = load_discriminator(args.adversarial_discriminator)
            drawn = (self.timestep_sampling, self.timestep_grid)
            self._adversary = AdversarialTerm(args, self.family, *discriminator, *drawn)

        if args.caption_dropout:
            with torch.no_grad():
                self._unconditional = self.family.encode_unconditional()

        # Metrics of the steps since the last log: names, and a tensor that nobody has waited for yet
        self._unread: dict[str, list[tuple[list[str], Tensor]]] = {"train": [], "eval": []}

        streaming = isinstance(train_dataset, IterableDataset)
        if streaming and args.cache_latents:
            raise ValueError(
                "`cache_latents=True` can't be had for a stream: it would have to be read to its end before training. "
                "Leave it unset, or load the dataset without streaming."
            )
        self.cache_latents = not streaming if args.cache_latents is None else args.cache_latents
        self._collator = EncodedRowCollator() if self.cache_latents else RawRowCollator(self.family, self.resolution)
        if isinstance(train_dataset, (Dataset, IterableDataset)):
            train_dataset = to_ranked(train_dataset, "train")
        return wrapped, peft_config, train_dataset

    # Blocks are compiled by themselves, in `finish_set_up`, and not by Accelerate the whole model
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO

    def finish_set_up(self) -> None:
        """
        After the parent's `__init__`: the encoders leave memory, or come to the device where each step needs them.
        """
        self.add_callback(LogHistory())
        keep_buffers(self)
        self.callback_handler.callbacks.insert(0, PeakMemory())  # before those that write the log
        self._skipper = SkipNonFiniteSteps(self.args.max_skipped_steps)
        self.add_callback(self._skipper)
        self._average: MovingAverage | None = None
        if self.args.ema_decay is not None:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise ValueError(
                    "`ema_decay` isn't supported with DeepSpeed or FSDP, which keep the weights to themselves."
                )
            self._average = MovingAverage(self.args.ema_decay)
            self.add_callback(self._average)
        if self._adversary is not None:
            self._check_adaptive_weight()
            self._adversary.prepare(self.accelerator, self.model)
        if self.args.sample_steps is not None:
            self._add_samples()
        self._make_fast()
        self.processing_class = None  # TRL was given a tokenizer; none belongs beside a denoiser's weights
        if self.cache_latents:
            self.family.drop_encoders()
            for component in self._pipeline.components.values():
                if isinstance(component, nn.Module) and type(component) is not self.family.denoiser_class:
                    component.to("cpu")  # where the pipeline is the user's own, it stays his
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            for component in self.family.encoders.values():
                component.to(self.args.device)
        del self._pipeline

    def _add_samples(self) -> None:
        """The callback that draws during training; encodes its prompts, so before the text encoders leave memory."""
        if not self.is_world_process_zero():
            return
        for name, component in self.family.encoders.items():
            if name != "vae":
                component.to(self.args.device)
        prompts = self.args.sample_prompts or self._first_prompts(4)
        model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        sampler = TrainingSampler(
            self.family,
            model.denoiser,
            prompts,
            resolution=self.resolution,
            num_inference_steps=self.args.sample_inference_steps,
            guidance_scale=self.args.sample_guidance_scale,
            encode_batch_size=self.args.encode_batch_size,
        )
        callbacks = self.callback_handler.callbacks
        samples = SampleGrids(sampler, prompts, self.args, self.accelerator, self._average, callbacks)
        callbacks.insert(0, samples)  # before the trackers, which close what they write to when training ends

    def _first_prompts(self, count: int) -> list[str]:
        """The first distinct prompts of the eval dataset, or of the train dataset where there is none."""
        dataset = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        if self.cache_latents:
            tables = [table.select_columns("prompt") for table in self._collator.prompt_tables]
            dataset = dataset.select_columns(["prompt_table", "prompt_index"])
            texts = (tables[row["prompt_table"]][row["prompt_index"]]["prompt"] for row in dataset)
        else:
            texts = (row["prompt"] for row in dataset.select_columns("prompt"))
        prompts: dict[str, None] = {}
        for text in itertools.islice(texts, 1000):  # a dataset of few prompts may be long, a stream has no end
            prompts[text] = None
            if len(prompts) == count:
                break
        return list(prompts)

    def _make_fast(self) -> None:
        """What `channels_last` and `torch_compile` ask for, of the trained model and of a reference beside it."""
        denoiser_class = self.family.denoiser_class
        blocks = denoiser_class._repeated_blocks or denoiser_class._no_split_modules  # SD3 has only the latter
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is None:
                continue
            if self.args.channels_last:
                model.to(memory_format=torch.channels_last)
            if self.args.torch_compile:
                compile_blocks(
                    model, blocks, backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode
                )

    def _check_adaptive_weight(self) -> None:
        """The adaptive weight looks at a gradient in the middle of a step, which not every set-up has."""
        kwargs = self.args.gradient_checkpointing_kwargs or {}
        if self.args.adversarial_adaptive and self.args.gradient_checkpointing and kwargs.get("use_reentrant", False):
            raise ValueError(
                "`adversarial_adaptive=True` can't be used with reentrant gradient checkpointing; set "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`, or leave it out."
            )

    # Dataset

    # Replaces tokenizing: images become latents, prompts embeddings, once
    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if dataset.column_names is not None and "latents" in dataset.column_names:
            return dataset  # encoded before
        dataset = to_ranked(dataset, dataset_name)
        if isinstance(dataset, IterableDataset):
            if self.cache_latents:
                raise ValueError(
                    f"The {dataset_name} dataset is a stream, but the train dataset is cached: load both without "
                    "streaming, or set `cache_latents=False`."
                )
            return dataset
        skip = args.on_bad_row == "skip"
        with global_then_local_main_first():
            dataset = dataset.select(check_rows(dataset, dataset_name, skip))
            if not self.cache_latents:
                return dataset
            if self.family.pipeline is None:
                raise ValueError(
                    f"The {dataset_name} dataset isn't encoded, and the VAE and text encoders have left memory. Pass "
                    "it as `eval_dataset` when the trainer is made, or set `cache_latents=False`."
                )
            for component in self.family.encoders.values():
                component.to(args.device)
            encoded, prompts = encode_rows(
                dataset,
                self.family,
                name=dataset_name,
                resolution=self.resolution,
                fingerprint=Hasher.hash(
                    (FORMAT_VERSION, dataset._fingerprint, self._hash_encoders(), self.resolution, skip)
                ),
                batch_size=args.encode_batch_size,
                skip_bad_rows=skip,
            )
        table = self._collator.add_prompts(prompts)
        return encoded.add_column("prompt_table", [table] * len(encoded))

    def _hash_encoders(self) -> str:
        """Of the weights themselves: a folder's name says nothing about what lies in it."""
        if self._encoder_hash is None:
            encoders = self.family.encoders
            weights = [hash_module(module) for module in encoders.values()]
            config = {key: value for key, value in encoders["vae"].config.items() if not key.startswith("_")}
            self._encoder_hash = Hasher.hash([self.family.name, config, *weights])
        return self._encoder_hash

    # The columns that the collator reads instead of token ids
    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            if self.cache_latents:
                self._signature_columns = self.train_dataset.column_names
            else:
                self._signature_columns = list(ROW_COLUMNS)

    # A LoRA has float32 weights beside a base in half precision, and PEFT copies what it is given to float32. Under
    # autocast, which makes half precision of it again, the copies are a seventh of what is kept for the backward pass
    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        needless = is_peft_model(self.model) and self.accelerator.native_amp
        with disable_input_dtype_casting(self.model, active=needless):
            return super().train(*args, **kwargs)

    # Noise and errors

    def _probe_loss(self, inputs: dict[str, Any]) -> Tensor:
        asked, target = self._noised(inputs, visit=0)
        return self._ask(self.model, asked, target, inputs["mask"])[0].sum()

    def _visit(self, mode: str) -> int:
        """Which of a row's draws is due: another at each visit in training, always the same in evaluation."""
        return EVALUATION if mode == "eval" else int(self.state.epoch or 0)

    def _noised(self, inputs: dict[str, Any], visit: int) -> tuple[tuple[Tensor, Tensor, dict[str, Tensor]], Tensor]:
        """
        What the denoiser is asked for the images of all rows at their `visit`-th visit, and what it should say.

        Returns `(noisy_latents (M, C, h, w), timesteps (M,), conditioning)` and the target (M, C, h, w); the M images
        are those that `mask` has, without padding.
        """
        mask = inputs["mask"]  # (B, n)
        latents, conditioning = self._latents_and_conditioning(inputs)
        u, noise = draw_rows(self.args.seed, inputs["row_seeds"].tolist(), visit, tuple(latents.shape[1:]))
        drawn = (self.timestep_sampling, self.timestep_grid, self.resolution)
        timesteps = self.family.sample_timesteps(u, *drawn)  # (B,)
        row_of_image = mask.nonzero()[:, 0]  # (M,)
        if self.args.caption_dropout:
            rows = draw_captions(self.args.seed, inputs["row_seeds"].tolist(), visit, self.args.caption_dropout)
            dropped = rows.to(mask.device)[row_of_image]
            for name, tensor in self._unconditional.items():
                conditioning[name][dropped] = tensor.to(conditioning[name])
        timesteps = timesteps.to(mask.device)[row_of_image]
        noise = noise.to(mask.device)[row_of_image]
        noisy_latents = self.family.add_noise(latents, noise, timesteps)
        target = self.family.target(latents, noise, timesteps)
        return (noisy_latents.to(self.model.dtype), timesteps, conditioning), target

    def _ask(
        self, model: nn.Module, asked: tuple[Tensor, Tensor, dict[str, Tensor]], target: Tensor, mask: Tensor
    ) -> tuple[Tensor, Answer]:
        """One forward pass for all images: errors (B, n), and the answer they are those of, both with their graph."""
        with self.accelerator.autocast():
            prediction = model(*asked)  # (M, C, h, w)
        prediction = prediction.view_as(prediction)  # without the hooks of DeepSpeed's engine; see `AdversarialTerm`
        error = denoising_error(prediction, target)
        if self.args.timestep_weighting != "constant":
            error = error * timestep_weights(self.family, self.args.timestep_weighting, asked[1])
        error = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, error)
        return error, Answer(asked[0], asked[1], prediction, target)

    def _preserving(
        self, loss_of: Callable[[Tensor], Tensor], error: Tensor, answer: Answer, ranks: Tensor, mask: Tensor
    ) -> Tensor:
        """The loss of errors (B, n), with the losers' gradient scaled down where `preserve_mu` asks for it."""
        if self.args.preserve_mu is None or not error.requires_grad:
            return loss_of(error)
        fixed = error.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(fixed), fixed)
        of_images = (answer.prediction.detach().float() - answer.target.float()).flatten(1)  # (M, D)
        residual = torch.zeros(*mask.shape, of_images.size(1), device=mask.device)
        residual = residual.masked_scatter(mask.unsqueeze(2), of_images)  # (B, n, D)
        scales = preservation_scales(gradient, residual, ranks, mask, self.args.preserve_mu)
        return loss_of(scale_gradient(error, scales))

    def _with_adversary(
        self, loss: Tensor, answer: Answer, inputs: dict[str, Any], mode: str
    ) -> tuple[Tensor, dict[str, float]]:
        """
        The loss with the adversarial term, and what that logs. An evaluation leaves it out: with a discriminator that
        learns, its losses couldn't be compared.
        """
        is_off = self.state.global_step < self.args.adversarial_start * self.state.max_steps
        if self._adversary is None or mode == "eval" or is_off:
            return loss, {}
        return self._adversary(loss, answer, inputs, self._visit(mode))

    def _latents_and_conditioning(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (M, C, h, w) in float32 and conditioning {name: (M, ...)} of the images of all rows in turn."""
        mask = inputs["mask"]
        row_of_image = mask.nonzero()[:, 0]
        if self.cache_latents:
            latents, prompt_conditioning = inputs["latents"][mask].float(), inputs["prompt_conditioning"]
        else:
            with torch.no_grad():
                pixels = to_pixels(inputs["images"][mask])
                parts = [self.family.encode_images(part) for part in pixels.split(self.args.encode_batch_size)]
                latents, prompt_conditioning = torch.cat(parts), self.family.encode_prompts(inputs["prompts"])
        dtype = self.model.dtype
        conditioning = {name: tensor.to(dtype)[row_of_image] for name, tensor in prompt_conditioning.items()}
        conditioning |= {name: tensor[mask] for name, tensor in inputs["image_conditioning"].items()}
        return latents, conditioning

    # Logs

    def _store_metrics(
        self, mode: str, error: Tensor, rewards: Tensor, ranks: Tensor, mask: Tensor, others: dict[str, Tensor]
    ) -> None:
        """
        Means over the rows of all processes of what every trainer logs, under TRL's names, and of `others`, (B,) each,
        for the next log. They stay on the device until then: to read them is to wait for it, in the middle of a step.
        """
        chosen_reward, rejected_reward = monitors.chosen_and_rejected(rewards, ranks, mask)
        chosen_error, rejected_error = monitors.chosen_and_rejected(error, ranks, mask)
        per_row = {
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/margins": chosen_reward - rejected_reward,
            "rewards/accuracies": monitors.accuracy(rewards, ranks, mask),
            "rewards/kendall_tau": monitors.kendall_tau(rewards, ranks, mask),
            "rewards/saturation": monitors.saturation(rewards, ranks, mask),
            "logps/chosen": -0.5 * chosen_error,
            "logps/rejected": -0.5 * rejected_error,
            "error/chosen": chosen_error,
            "error/rejected": rejected_error,
            **others,
        }
        counts = better_than(ranks, mask).flatten(1).any(1)
        values = torch.stack([counts.float(), *per_row.values()], dim=1)  # (B, 1 + metrics)
        values = self.accelerator.gather_for_metrics(values)
        counts = values[:, :1]
        sums = torch.where(counts > 0, values, 0.0).sum(0)
        self._unread[mode].append((list(per_row), torch.cat([sums[:1], sums[1:] / sums[0]])))

    def _read_metrics(self) -> None:
        """
        The stored metrics to where TRL takes them from for its log. A step in which no row counts, all being ties,
        which a stream may hold, says nothing.
        """
        for mode, steps in self._unread.items():
            for names, values in steps:
                count, *means = values.tolist()
                for name, value in zip(names, means, strict=True) if count else ():
                    self._trls_metrics(mode, name).append(value)
            steps.clear()

    def _trls_metrics(self, mode: str, name: str) -> list[float]:
        """The list of a metric's values in which TRL's trainer collects them until its log."""
        return self._metrics[mode][name]

    # Adds the count of skipped steps
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._read_metrics()
        if self._skipper.skipped and "loss" in logs:
            logs["skipped_steps"] = self._skipper.skipped
        super().log(logs, start_time)

    # Saving

    # Replaces the files of a language model: a checkpoint holds what resuming reads, every folder what diffusers loads
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        is_lora = is_peft_model(self.model)
        if is_checkpoint:
            # PEFT would otherwise look on the Hub whether the "embeddings" were resized
            only_lora = {"save_embedding_layers": False} if is_lora else {}
            self.model.save_pretrained(folder, state_dict=state_dict, **only_lora)
            torch.save(self.args, folder / "training_args.bin")
        with self._average.applied(self.model) if self._average else contextlib.nullcontext():
            if is_lora:
                save_lora(self.model, self.family, folder, state_dict)
            elif not is_checkpoint:
                save_denoiser(self.model, self.family, folder, state_dict)
        if is_lora and not is_checkpoint:
            save_comfy_lora_if_possible(folder, self.model.get_base_model().denoiser)
        if self._adversary is not None and not is_checkpoint:
            self._adversary.save_discriminator(folder / "discriminator")

    # Adds the moving average and the adversarial term's state
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None and self.args.should_save:
            self._average.save(output_dir)
        if self._adversary is not None and self.args.should_save:
            self._adversary.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._average is not None and checkpoint is not None:
            self._average.load(checkpoint)
            self._average.weights = [weight.to(self.args.device) for weight in self._average.weights]
        if self._adversary is not None and checkpoint is not None:
            self._adversary.load(checkpoint)

    # Replaces TRL's card, which shows a text-generation pipeline
    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        if not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        folder = Path(self.args.output_dir)
        base_model, is_lora = self.model.config.name_or_path, is_peft_model(self.model)
        comfy_file = folder / f"{folder.resolve().name}{SUFFIX}"
        grids = sorted((folder / "samples").glob("step-*.png"))
        card = DiffusionCard(
            name=self.hub_model_id or model_name or folder.name,
            base_model=base_model,
            denoiser=None if is_lora else (self.family.denoiser_name, self.family.denoiser_class.__name__),
            introduction=introduction(base_model, is_lora, self._paper),
            tags=[*self._tag_names, *tags],
            comfy_file=comfy_file.name if comfy_file.is_file() else None,
            dataset=dataset_name,
            license=license_of(base_model) if self.args.push_to_hub else {},
            sections={"Samples during training": f"![Samples](samples/{grids[-1].name})"} if grids else {},
        )
        card.render().save(folder / "README.md")


def refuse(argument: str, value: Any, reason: str) -> None:
    if value is not None:
        raise ValueError(f"`{argument}` can't be used with a diffusion model: {reason}. Leave it out.")


def _resolve_model(
    model: str | DiffusionPipeline | nn.Module, processing_class: DiffusionPipeline | None, init_kwargs: dict | None
) -> tuple[DiffusionPipeline, nn.Module | None]:
    """The pipeline that encodes, and the denoiser that is trained where it isn't the pipeline's own."""
    if processing_class is not None and not isinstance(processing_class, DiffusionPipeline):
        raise TypeError(
            "`processing_class` turns prompts and images into tensors, so it must be a `DiffusionPipeline`, got "
            f"`{type(processing_class).__name__}`."
        )
    if isinstance(model, str):
        return load_pipeline(model, **_pipeline_kwargs(init_kwargs)), None
    if init_kwargs:
        raise ValueError("`model_init_kwargs` are for loading a model by name, but `model` is loaded. Leave them out.")
    if isinstance(model, DiffusionPipeline):
        return model, None
    if isinstance(model, nn.Module):
        if is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "The denoiser already carries an adapter. Fuse it (`pipeline.fuse_lora()` and "
                "`pipeline.unload_lora_weights()`) and pass a `peft_config` for the new one."
            )
        source = processing_class or getattr(model, "config", {}).get("_name_or_path")
        if not source:
            raise ValueError(
                f"`model` is a `{type(model).__name__}` that doesn't say where it was loaded from: pass the pipeline "
                "it belongs to as `processing_class`."
            )
        return source if isinstance(source, DiffusionPipeline) else load_pipeline(source), model
    raise TypeError(
        "`model` must be a Hub id, a folder, a `DiffusionPipeline` or a denoiser (`torch.nn.Module`), got "
        f"`{type(model).__name__}`."
    )


def _with_quantization(
    init_kwargs: dict[str, Any] | None, quantization_config: BitsAndBytesConfig | None, model: Any
) -> dict[str, Any] | None:
    """`model_init_kwargs` with the trainer's argument in it, which TRL allows in one of the two places."""
    if quantization_config is None:
        return init_kwargs
    if not isinstance(model, str):
        raise ValueError(
            "`quantization_config` says how to load a model, but `model` is loaded. Pass its name, or leave "
            "`quantization_config` out."
        )
    if (init_kwargs or {}).get("quantization_config") is not None:
        raise ValueError(
            "`quantization_config` is set twice: as an argument and in `model_init_kwargs`. Leave one out."
        )
    return {**(init_kwargs or {}), "quantization_config": quantization_config}


def _pipeline_kwargs(init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """TRL's `model_init_kwargs` as `load_pipeline` takes them; None means unset there."""
    kwargs = {name: value for name, value in (init_kwargs or {}).items() if value is not None}
    if kwargs.pop("trust_remote_code", False):
        kwargs["trust_remote_code"] = True  # diffusers warns when it is passed without need
    if kwargs.get("revision") == "main":
        del kwargs["revision"]  # TRL's default; a folder has no revisions
    if "attn_implementation" in kwargs:
        raise ValueError(
            f"`attn_implementation={kwargs['attn_implementation']!r}` is Transformers' option. Diffusers chooses "
            "PyTorch's scaled dot product attention; for another, call `set_attention_backend` on the denoiser and "
            "pass the loaded pipeline as `model`."
        )
    return kwargs


def _denoiser_peft_config(config: PeftConfig, default_targets: tuple[str, ...]) -> PeftConfig:
    """The user's config for a denoiser inside its wrapper."""
    if config.task_type not in (None, "CAUSAL_LM"):  # CAUSAL_LM is the default of TRL's ModelConfig
        raise ValueError(f"`lora_task_type={config.task_type!r}` has no meaning for a denoiser. Leave it unset.")
    if getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none":
        raise ValueError(
            "`modules_to_save` and `bias` would train weights that a diffusers LoRA file can't hold: got "
            f"`modules_to_save={config.modules_to_save}`, `bias={config.bias!r}`. Leave them unset, or train all "
            "weights without a `peft_config`."
        )
    targets = config.target_modules or list(default_targets)
    if isinstance(targets, str) and targets != "all-linear":
        targets = rf"denoiser\.(?:{targets})"  # PEFT matches a pattern against the whole name
    return replace(config, task_type=None, target_modules=targets)
