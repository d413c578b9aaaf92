"""The adversarial term in a trainer's loss: a discriminator looks at what the denoiser takes for the clean image."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from trl_diffusion_rank.diffusion.draws import draw_captions, stable_seed
from trl_diffusion_rank.diffusion.families.base import Family
from trl_diffusion_rank.diffusion.families.flow import FlowMatchingFamily
from trl_diffusion_rank.discriminator import AestheticDiscriminator, AestheticDiscriminatorProcessor
from trl_diffusion_rank.discriminator.configuration import check_is_discriminator
from trl_diffusion_rank.objectives.adversarial import (
    adaptive_ratio,
    discriminator_loss,
    frozen_loss,
    joint_loss,
    moving_average,
    smoothness_penalty,
    with_gradient,
)
from trl_diffusion_rank.objectives.ranking import extremes


if TYPE_CHECKING:
    from trl_diffusion_rank.trainers.diffusion_options import DiffusionOptions


ALL_NOISE = 500.0  # sigma / alpha: schedules end at 15 (SD, SDXL) or 157 (DDPM), a zero terminal SNR at infinity
RATIO_DECAY = 0.9  # of the moving average of the adaptive weight: it follows within some ten steps
SMOOTHNESS_NOISE = 0.01  # https://huggingface.co/papers/2501.08316, section 3.4


class Answer(NamedTuple):
    """What the denoiser was asked for M images, what it said, with its graph, and what it should have said."""

    noisy_latents: Tensor  # (M, C, h, w)
    timesteps: Tensor  # (M,)
    prediction: Tensor  # (M, C, h, w)
    target: Tensor  # (M, C, h, w)


class AdversarialTerm:
    """
    The term for a trainer's loss, and in `joint` mode the training of its discriminator.

    The clean estimate comes from the prediction that the main loss is made of. Its gradient with respect to that
    prediction is computed at once, so that VAE and discriminator are out of memory when the denoiser's backward pass
    runs, and nothing but the denoiser ever gets a gradient from it.

    In `joint` mode the discriminator learns from the same estimates, as fakes, and from the same rows' best images:
    what the *true* prediction stands for, decoded by the same VAE, so that the trace of the VAE is no give-away. It
    gathers gradients over the micro-batches of an optimizer step and makes one step of its own AdamW, at a constant
    learning rate, with its own clipping by `max_grad_norm`. Its text tower stays frozen: each caption is read once.
    Gradients are summed over all processes, whatever library the denoiser is distributed with.

    Args:
        args: a trainer's config.
        family ([`Family`]): with its pipeline, of whose VAE the decoder is copied.
        discriminator ([`AestheticDiscriminator`]), processor ([`AestheticDiscriminatorProcessor`]):
            What judges; changed in place in `joint` mode.
        timestep_sampling (`str`), timestep_grid (`list[int]` or None): what the trainer draws timesteps from.
    """

    FILE = "adversarial.pt"

    def __init__(
        self,
        args: DiffusionOptions,
        family: Family,
        discriminator: AestheticDiscriminator,
        processor: AestheticDiscriminatorProcessor,
        timestep_sampling: str,
        timestep_grid: list[int] | None,
    ):
        self.args = args
        self.is_joint = args.adversarial_mode == "joint"
        self.max_noise = noise_limit(family, args.adversarial_max_noise, timestep_sampling, timestep_grid)
        self.decoder = decoding_family(family, args.adversarial_vae, args.bf16)
        if args.gradient_checkpointing:
            self.decoder.pipeline.vae.enable_gradient_checkpointing()
        self.discriminator = discriminator.requires_grad_(False).float().eval()
        self.processor = processor
        if self.is_joint:
            # After this the text tower is still frozen, which `_captions` relies on
            self.discriminator.freeze_backbone(args.discriminator_trainable_layers)
            self.discriminator.score_head.requires_grad_(True)
            if self.discriminator.config.text_conditioned:
                self.discriminator.logit_scale.requires_grad_(True)
        self.ratio: float | None = None
        self._known_captions: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._images_judged = 0.0

    def prepare(self, accelerator: Accelerator, denoiser: nn.Module) -> None:
        """After the trainer's set-up: move to the device, make the discriminator's optimizer."""
        self.accelerator = accelerator
        self._weight_at: nn.Parameter | None = None
        if self.args.adversarial_adaptive:
            self._weight_at = last_trained_weight(denoiser)
            denoiser.register_forward_hook(self._keep_output)
        self.device = accelerator.device
        self.decoder.pipeline.vae.to(self.device)
        self.discriminator.to(self.device)
        self.optimizer: torch.optim.Optimizer | None = None
        if self.is_joint:
            # VQGAN's betas: a discriminator chases a moving target, so its memory is short
            self.optimizer = torch.optim.AdamW(
                self._trained.values(), lr=self.args.discriminator_learning_rate, betas=(0.5, 0.9), weight_decay=0.0
            )

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.discriminator.named_parameters() if p.requires_grad}

    # The term

    def __call__(
        self, loss: Tensor, answer: Answer, inputs: dict[str, Any], visit: int
    ) -> tuple[Tensor, dict[str, float]]:
        """
        The loss with the term added, and what is logged of it.

        Args:
            loss: the main loss of this process, a scalar that depends on `answer.prediction`.
            answer: of the M images that the batch's mask has.
            inputs: the batch: `ranks`, `mask` (B, n), `row_seeds` (B,), `prompts`.
            visit: which of a row's draws this is.
        """
        best, clear = self._candidates(answer.timesteps, inputs, visit)  # (M,), (M,)
        reals = self._pick(best, inputs, visit)  # (R,); a row has a best image, so there are none without fakes
        fakes = reals if self.args.adversarial_on == "best" else self._pick(clear, inputs, visit)  # (N,)
        counts = torch.tensor([len(fakes), len(reals)], dtype=torch.float32, device=self.device)
        totals = self.accelerator.reduce(counts, "sum").tolist()  # of all processes
        sums = dict.fromkeys(("loss", "score_fake", "score_real", "correct_fake", "correct_real"), 0.0)

        value = torch.zeros((), device=self.device)
        if len(fakes):
            value, gradient, pixels = self._denoiser_loss(answer, fakes, inputs, totals[0], sums)
            if self.is_joint:
                self._judge(answer, reals, fakes, pixels, inputs, visit, totals, sums)
            value = with_gradient(value, answer.prediction[fakes], gradient)
        if self.is_joint:
            self._micro_batches += 1
            self._images_judged += totals[0]
            if self.accelerator.sync_gradients:
                self._step()
        if not totals[0]:
            return loss, {}
        weight = self.args.adversarial_weight
        if self._weight_at is not None:
            weight *= self._ratio(loss, value, answer.prediction)
        return loss + weight * value, self._logs(sums, totals, weight)

    def _logs(self, sums: dict[str, Any], totals: list[float], weight: float) -> dict[str, float]:
        """Means over the images of all processes."""
        summed = torch.stack([torch.as_tensor(value, device=self.device).float() for value in sums.values()])
        means = dict(zip(sums, self.accelerator.reduce(summed, "sum").tolist(), strict=True))
        logs = {"loss": means["loss"] / totals[0], "score_fake": means["score_fake"] / totals[0], "weight": weight}
        if self.is_joint:
            logs["score_real"] = means["score_real"] / totals[1]
            logs["accuracy"] = (means["correct_fake"] / totals[0] + means["correct_real"] / totals[1]) / 2
        return {f"adversarial/{name}": value for name, value in logs.items()}

    def _candidates(self, timesteps: Tensor, inputs: dict[str, Any], visit: int) -> tuple[Tensor, Tensor]:
        """
        Which of M images can be judged, (M,): of the best ones of their rows, and of all.

        Not above the noise limit, where the estimate is a blur, and not where the caption was dropped: the denoiser
        didn't know it.
        """
        ranks, mask = inputs["ranks"], inputs["mask"]  # (B, n)
        clear = self.decoder.snr(timesteps).rsqrt() <= self.max_noise
        if self.args.caption_dropout:
            drawn = (self.args.seed, inputs["row_seeds"].tolist(), visit, self.args.caption_dropout)
            clear &= ~draw_captions(*drawn).to(mask.device)[mask.nonzero()[:, 0]]
        return extremes(ranks, mask)[0][mask] & clear, clear

    def _pick(self, candidates: Tensor, inputs: dict[str, Any], visit: int) -> Tensor:
        """Positions of no more than `adversarial_max_images` of the candidates (M,), drawn from the rows' seeds."""
        positions = candidates.nonzero()[:, 0]
        most = self.args.adversarial_max_images
        if len(positions) <= most:
            return positions
        seed = stable_seed(self.args.seed, visit, "images", *inputs["row_seeds"].tolist())
        drawn = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))[:most]
        return positions[drawn.sort().values.to(positions.device)]

    def _denoiser_loss(
        self, answer: Answer, fakes: Tensor, inputs: dict[str, Any], num_fakes: float, sums: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        The term's value, its gradient with respect to the predictions of `fakes` (N, C, h, w), and the N images as the
        discriminator saw them.

        Divided by the images of all processes and multiplied by the processes, whose gradients are averaged: an image
        weighs the same wherever it lies.
        """
        with torch.enable_grad():
            prediction = answer.prediction[fakes].detach().float().requires_grad_()
            pixels = self._clean_pixels(answer, fakes, prediction)
            scores = self._score(pixels, self._captions(fakes, inputs))
            losses = joint_loss(scores) if self.is_joint else frozen_loss(scores, self.args.adversarial_margin)
            value = losses.sum() * (self.accelerator.num_processes / num_fakes)
            (gradient,) = torch.autograd.grad(value, prediction)
        sums["loss"], sums["score_fake"] = losses.detach().sum(), scores.detach().sum()
        return value.detach(), gradient, pixels.detach()

    def _clean_pixels(self, answer: Answer, positions: Tensor, prediction: Tensor) -> Tensor:
        """What predictions (N, C, h, w) for the images at `positions` (N,) stand for, as the discriminator's input."""
        noisy_latents, timesteps = answer.noisy_latents[positions].float(), answer.timesteps[positions]
        clean = self.decoder.predict_clean(noisy_latents, timesteps, prediction)
        with torch.autocast(self.device.type, enabled=False):  # the VAE's own dtype says how it is to run
            return self.processor.preprocess_pixels(self.decoder.decode(clean).float())

    def _captions(self, positions: Tensor, inputs: dict[str, Any]) -> Tensor | None:
        """
        The embeddings (N, d) of the captions of the images at `positions` (N,), each caption read once in a run.

        One at a time: beside others a caption is padded differently, so its embedding would depend on its company.
        """
        if not self.discriminator.config.text_conditioned:
            return None
        rows = inputs["mask"].nonzero()[:, 0][positions].tolist()
        prompts = [inputs["prompts"][row] for row in rows]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._known_captions:
                    tokens = {name: ids.to(self.device) for name, ids in self.processor.tokenize([prompt]).items()}
                    self._known_captions[prompt] = self.discriminator.encode_captions(**tokens)[0].cpu()
        return torch.stack([self._known_captions[prompt] for prompt in prompts]).to(self.device)

    def _score(self, pixels: Tensor, captions: Tensor | None) -> Tensor:
        """Logits (N,) of processed images (N, 3, h, w), each with its caption (N, d)."""
        # Not in float16, whose gradients would have to be scaled: without `bf16` in float32
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bool(self.args.bf16), cache_enabled=False):
            images = self.discriminator.encode_images(pixels)
        if captions is None:
            return images.unconditional
        return self.discriminator.pair_scores(images, captions).diagonal()

    def _keep_output(self, denoiser: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """
        Forward hook: what comes out of the denoiser before DeepSpeed's engine hangs hooks on it, to which any gradient
        that passes is the backward pass of the step. The engine gets another view of it.
        """
        if not output.requires_grad:  # the reference
            return None
        self._output = output
        return output.view_as(output)

    def _ratio(self, loss: Tensor, value: Tensor, prediction: Tensor) -> float:
        """The moving average of the ratio of both gradients, those that all processes have together."""
        gradients = []
        for scalar in (loss, value):
            if scalar.requires_grad:
                (gradient,) = torch.autograd.grad(scalar, prediction, retain_graph=True)
                (gradient,) = torch.autograd.grad(self._output, self._weight_at, gradient, retain_graph=True)
                gradients.append(gradient.float())
            else:  # this process has no image to judge
                gradients.append(torch.zeros_like(self._weight_at, dtype=torch.float32))
        of_loss, of_term = self.accelerator.reduce(torch.stack(gradients), "mean")
        self.ratio = moving_average(self.ratio, adaptive_ratio(of_loss, of_term), RATIO_DECAY)
        return self.ratio or 0.0

    # The discriminator

    def _judge(
        self,
        answer: Answer,
        reals: Tensor,
        fakes: Tensor,
        fake_pixels: Tensor,
        inputs: dict[str, Any],
        visit: int,
        totals: list[float],
        sums: dict[str, Any],
    ) -> None:
        """Add the gradient of the discriminator's loss on these images to what this optimizer step has gathered."""
        with torch.no_grad():
            real_pixels = self._clean_pixels(answer, reals, answer.target[reals].float())
        noisy_pixels = real_pixels + SMOOTHNESS_NOISE * self._noise(real_pixels, reals, inputs, visit)
        with torch.enable_grad():
            captions = self._captions(torch.cat([fakes, reals, reals]), inputs)
            scores = self._score(torch.cat([fake_pixels, real_pixels, noisy_pixels]), captions)
            fake, real, noisy = scores.split([len(fakes), len(reals), len(reals)])
            loss = discriminator_loss(fake, torch.zeros_like(fake, dtype=torch.bool)).sum() / totals[0]
            loss = loss + discriminator_loss(real, torch.ones_like(real, dtype=torch.bool)).sum() / totals[1]
            penalty = smoothness_penalty(real, noisy).sum() / totals[1]
            (loss + self.args.adversarial_regularization * penalty).backward()
        sums["score_real"] = real.detach().sum()
        sums["correct_fake"], sums["correct_real"] = (fake < 0).sum(), (real > 0).sum()

    def _noise(self, pixels: Tensor, positions: Tensor, inputs: dict[str, Any], visit: int) -> Tensor:
        """Standard normal noise for `pixels` (R, 3, h, w) of the images at `positions` (R,), tied to their rows."""
        noise = []
        for row_seed in inputs["row_seeds"][inputs["mask"].nonzero()[:, 0][positions]].tolist():
            seed = stable_seed(self.args.seed, row_seed, visit, "smoothness")
            noise.append(torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(seed)))
        return torch.stack(noise).to(pixels)

    def _step(self) -> None:
        """One step of the discriminator from the gradients of all micro-batches and processes, which all do alike."""
        if self._images_judged:
            parameters = list(self._trained.values())
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = self.accelerator.reduce(nn.utils.parameters_to_vector(gradients), "sum") / self._micro_batches
            norm, most = flat.norm(), self.args.max_grad_norm
            if most:
                flat = flat * (most / (norm + 1e-6)).clamp(max=1)
            for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = gradient.view_as(parameter)
            if torch.isfinite(norm):  # as `SkipNonFiniteSteps` does for the denoiser
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._micro_batches, self._images_judged = 0, 0.0

    # Files

    def save(self, folder: str | Path) -> None:
        """What a checkpoint holds of the term: nothing in `frozen` mode with a fixed weight."""
        state = {"ratio": self.ratio}
        if self.is_joint:
            state |= {"discriminator": self._trained, "optimizer": self.optimizer.state_dict()}
        elif not self.args.adversarial_adaptive:
            return
        torch.save(state, Path(folder) / self.FILE)

    def load(self, folder: str | Path) -> None:
        """Raises `ValueError` for a checkpoint of a run without the term, or with another part of it trained."""
        if not self.is_joint and not self.args.adversarial_adaptive:
            return
        path = Path(folder) / self.FILE
        state = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {}
        if not state or (self.is_joint and set(state.get("discriminator", ())) != set(self._trained)):
            raise ValueError(
                f"`adversarial_mode={self.args.adversarial_mode!r}`, but `{folder}` is a checkpoint of a run with "
                "another adversarial term or none. Resume with that run's `adversarial_mode`, `adversarial_adaptive` "
                "and `discriminator_trainable_layers`, or start anew."
            )
        self.ratio = state["ratio"]
        if self.is_joint:
            with torch.no_grad():
                for name, parameter in self._trained.items():
                    parameter.copy_(state["discriminator"][name])
            self.optimizer.load_state_dict(state["optimizer"])

    def save_discriminator(self, folder: str | Path) -> None:
        """What `joint` mode trained, as a folder that `adversarial_discriminator` and the scorers take."""
        if self.is_joint:
            self.discriminator.save_pretrained(folder)
            self.processor.save_pretrained(folder)


def load_discriminator(name: str) -> tuple[AestheticDiscriminator, AestheticDiscriminatorProcessor]:
    """The discriminator in float32 and its processor, by folder or Hub id."""
    try:
        check_is_discriminator(name, f"`adversarial_discriminator={name!r}`")
        model = AestheticDiscriminator.from_pretrained(name, dtype=torch.float32)
        return model, AestheticDiscriminatorProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"`adversarial_discriminator={name!r}` can't be loaded: {str(error).strip().splitlines()[0]} Give the "
            "folder or Hub id of an aesthetic discriminator with its processor."
        ) from error


def noise_limit(
    family: Family, max_noise: float | None, timestep_sampling: str, timestep_grid: list[int] | None
) -> float:
    """
    The largest sigma / alpha at which a clean estimate is judged.

    By default that of the middle of the schedule, of flow matching that at sigma = 0.6; with `turbo`, whose model is
    made to jump from anywhere, whatever has a signal. Raises `ValueError` where no timestep of the grid is below it.
    """
    if max_noise is None and timestep_sampling == "turbo":
        max_noise = ALL_NOISE
    elif max_noise is None:
        steps = family.num_train_timesteps
        timestep = 0.6 * steps if isinstance(family, FlowMatchingFamily) else steps // 2
        max_noise = family.snr(torch.tensor([timestep])).rsqrt().item()
    if timestep_grid is not None:
        noise = family.snr(torch.tensor(timestep_grid)).rsqrt()
        if not (noise <= max_noise).any():
            raise ValueError(
                f"No timestep of {timestep_grid} is below the adversarial term's noise limit, sigma / alpha = "
                f"{max_noise:.3g} (theirs: {', '.join(f'{value:.3g}' for value in noise)}): the term would never act. "
                "Train other timesteps, raise `adversarial_max_noise`, or leave `adversarial_mode` out. Where there "
                "is no signal (alpha = 0) there is no estimate."
            )
    return max_noise


def decoding_family(family: Family, tiny_vae: str | None, bf16: bool) -> Family:
    """
    The family with nothing but a frozen copy of its VAE without the encoder, or with a tiny VAE.

    In bfloat16 where training is. Not in float16, in which SDXL's VAE overflows and small gradients vanish.
    """
    own = family.encoders["vae"]
    vae = copy.deepcopy(own) if tiny_vae is None else load_tiny_vae(tiny_vae, own.config.latent_channels)
    vae.encoder = vae.quant_conv = None
    dtype = torch.bfloat16 if bf16 or own.dtype == torch.bfloat16 else torch.float32
    if vae.dtype != dtype:
        vae = vae.to(dtype)
    decoder = copy.copy(family)
    decoder.pipeline = SimpleNamespace(vae=vae.requires_grad_(False).eval())
    return decoder


def load_tiny_vae(name: str, latent_channels: int) -> AutoencoderTiny:
    """
    An `AutoencoderTiny` (TAESD and its like) by folder or Hub id, for latents of as many channels.

    It takes the denoiser's latents as they are: its config has `scaling_factor` 1 and `shift_factor` 0, so that
    `Family.decode`, which reads the VAE's config as pipelines do, needs to know nothing of it.
    """
    try:
        config = AutoencoderTiny.load_config(name)
        if config.get("_class_name") != AutoencoderTiny.__name__:
            raise ValueError(
                f"`adversarial_vae={name!r}` is a `{config.get('_class_name')}`; an `AutoencoderTiny` is expected "
                "(madebyollin/taesd, taesdxl, taesd3 or taef1). Without it the pipeline's own VAE decodes."
            )
        vae = AutoencoderTiny.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"`adversarial_vae={name!r}` can't be loaded: {str(error).strip().splitlines()[0]} Give the folder or Hub "
            "id of an `AutoencoderTiny`."
        ) from error
    if vae.config.latent_channels != latent_channels:
        raise ValueError(
            f"`adversarial_vae={name!r}` decodes latents of {vae.config.latent_channels} channels, the model's have "
            f"{latent_channels}. Give the tiny VAE that was made for this model."
        )
    return vae


def last_trained_weight(model: nn.Module) -> nn.Parameter:
    """
    The last LoRA-B weight, or without LoRA the last trained weight: where VQGAN's ratio is taken, because no more than
    the denoiser's end has to be gone through for it.
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
    names = [name for name in weights if "lora_B" in name] or list(weights)
    # A UNet runs its middle before its up blocks, but registers it after them
    names.sort(key=lambda name: "mid_block" not in name)
    return weights[names[-1]]
