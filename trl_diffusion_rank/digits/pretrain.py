"""Pretrain the digits world's base text-to-image model and save it in the layout of StableDiffusionXLPipeline.

    python -m trl_diffusion_rank.digits.pretrain --output_dir my_digits_model --seed 0

The base learns from an unfiltered crawl (more than half of it ugly, captions silent about it), as web-trained models
do. Four small stages on one thread: a tokenizer, two text encoders (contrastively, against the images), an autoencoder
and a UNet. The same seed gives the same weights, bit for bit, on the same machine.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trl_diffusion_rank.digits.classifiers import to_pixels
from trl_diffusion_rank.digits.data import CAPTION_TEMPLATES, DIGITS, IMAGE_SIZE, INKS, Crawl, caption, crawl


MAX_TOKENS = 16
TEXT_WIDTHS = (64, 32)  # hidden sizes of the two text encoders; the UNet sees both side by side
POOLED_WIDTH = 64
TIME_ID_WIDTH = 8
CAPTION_DROPOUT = 0.1
# (original height, width, crop top, left, target height, width): what the stock pipeline passes at the native size.
TIME_IDS = (IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE)


@dataclass(frozen=True)
class Budget:
    """How long each stage trains, in optimizer steps, and how many images the crawl holds."""

    crawl_size: int = 24_000
    text_steps: int = 500
    vae_steps: int = 700
    unet_steps: int = 1_700


def batches(num: int, batch_size: int, steps: int, name: str) -> Iterator[torch.Tensor]:
    """`steps` random index batches `(batch_size,)`, behind a progress bar."""
    for _ in tqdm(range(steps), desc=name):
        yield torch.randint(num, (batch_size,))


# ------------------------------------------------------------------------------------------------------ tokenizer


def train_tokenizer() -> CLIPTokenizer:
    """A BPE of all captions; the vocabulary in CLIP's order: bytes, bytes that end a word, merges, special tokens."""
    captions = [caption(d, i, t) for d in DIGITS for i in INKS for t in range(len(CAPTION_TEMPLATES))]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # 1,000 is more than is ever reached: every word of the captions becomes one token.
    trainer = trainers.BpeTrainer(vocab_size=1_000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # All bytes, also those that no caption has: an unknown token would be CLIP's end-of-text.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids `(N, 16)`, padded and truncated as the stock pipeline does."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


# -------------------------------------------------------------------------------------------------- text encoders


def make_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's pair: a CLIP text model, and a second one with a pooled projection."""
    encoders = []
    for width, kind in zip(TEXT_WIDTHS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=POOLED_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        encoders.append(kind(config))
    return encoders[0], encoders[1]


def encode_text(
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `(B, 16)` to SDXL's conditioning: prompt embeddings `(B, 16, 96)` and pooled embeddings `(B, 64)`."""
    first, second = (encoder(ids, output_hidden_states=True) for encoder in encoders)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


class ContrastiveHeads(nn.Module):
    """Maps images, and each of the states that SDXL reads from its text encoders, to one space of unit vectors."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 64)),
        )
        self.states = nn.ModuleList(nn.Linear(width, 64) for width in TEXT_WIDTHS)
        self.pooled = nn.Linear(POOLED_WIDTH, 64)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, pixels: torch.Tensor, prompt_embeds: torch.Tensor, pooled: torch.Tensor) -> list[torch.Tensor]:
        """Similarity logits `(B, B)`, images by captions, one matrix for each view of the text."""
        images = F.normalize(self.image(pixels), dim=-1)
        # The penultimate states get a loss of their own: CLIP's sits on the last layer, which SDXL does not read.
        views = prompt_embeds.mean(dim=1).split(TEXT_WIDTHS, dim=-1)
        texts = [head(view) for head, view in zip(self.states, views, strict=True)] + [self.pooled(pooled)]
        return [self.log_scale.exp() * images @ F.normalize(text, dim=-1).T for text in texts]


def train_text_encoders(
    tokenizer: CLIPTokenizer, data: Crawl, steps: int
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Contrastive training against the images: without it a UNet this small hardly learns what the words mean."""
    encoders = make_text_encoders(tokenizer)
    heads = ContrastiveHeads()
    parameters = [p for module in (*encoders, heads) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    ids = tokenize(tokenizer, data.captions)
    pixels = to_pixels(data.images)
    meaning = torch.from_numpy(data.digits * len(INKS) + data.inks)
    for index in batches(len(ids), 64, steps, "text encoders"):
        # Captions of the same digit and ink all describe the image: the target is uniform over them.
        same = (meaning[index][:, None] == meaning[index]).float()
        target = same / same.sum(dim=1, keepdim=True)
        logits = heads(pixels[index], *encode_text(encoders, ids[index]))
        loss = sum(F.cross_entropy(view, target) + F.cross_entropy(view.T, target) for view in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for encoder in encoders:
        encoder.eval().requires_grad_(False)
    return encoders


# ---------------------------------------------------------------------------------------------------- autoencoder


def train_vae(pixels: torch.Tensor, steps: int) -> AutoencoderKL:
    """`(3, 16, 16)` images to `(4, 8, 8)` latents of zero mean and unit variance in each channel."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for index in batches(len(pixels), 32, steps, "autoencoder"):
        posterior = vae.encode(pixels[index]).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(reconstruction, pixels[index]) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    vae.eval().requires_grad_(False)
    whiten_latents(vae, pixels[:2_000])
    return vae


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Make every latent channel zero mean and unit variance, by folding the affine map into the 1x1 convolutions.

    The channels differ in mean and spread, which a single `scaling_factor` cannot mend. `quant_conv` gives the means
    and the log-variances of the latents, `post_quant_conv` reads the latents back.
    """
    latents = vae.encode(pixels).latent_dist.mean  # (N, 4, 8, 8)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.weight[:channels] /= std[:, None, None, None]
    vae.quant_conv.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Moments `(N, 8, 8, 8)` of the latents: four channels of means, four of log-variances."""
    return torch.cat([vae.encode(chunk).latent_dist.parameters for chunk in pixels.split(500)])


# ----------------------------------------------------------------------------------------------------------- unet


def make_unet() -> UNet2DConditionModel:
    """An SDXL-like UNet of about a million parameters: no attention at 8x8, cross-attention at 4x4."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4),  # in SDXL's convention, which diffusers keeps for its sake, the number of heads
        transformer_layers_per_block=1,
        use_linear_projection=True,
        cross_attention_dim=sum(TEXT_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=POOLED_WIDTH + len(TIME_IDS) * TIME_ID_WIDTH,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule; trailing timesteps, so that few-step sampling starts from pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def train_unet(
    scheduler: DDIMScheduler, moments: torch.Tensor, prompt_embeds: torch.Tensor, pooled: torch.Tensor, steps: int
) -> UNet2DConditionModel:
    """Epsilon prediction on latents, given each image's `prompt_embeds` `(N, 16, 96)` and `pooled` `(N, 64)`."""
    unet = make_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    ema = EMAModel(unet.parameters(), decay=0.998)
    time_ids = torch.tensor([TIME_IDS], dtype=torch.float32)
    for index in batches(len(moments), 48, steps, "unet"):
        mean, logvar = moments[index].chunk(2, dim=1)
        latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn_like(mean)
        noise = torch.randn_like(latents)
        # U^0.6 favours high noise, where it is decided which digit appears and whether it is ugly.
        timesteps = (scheduler.config.num_train_timesteps * torch.rand(len(index)) ** 0.6).long()
        # Zeros for a dropped caption: what the pipeline's unconditional branch is with `force_zeros_for_empty_prompt`.
        kept = (torch.rand(len(index)) >= CAPTION_DROPOUT).float()
        prediction = unet(
            scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=prompt_embeds[index] * kept[:, None, None],
            added_cond_kwargs={
                "text_embeds": pooled[index] * kept[:, None],
                "time_ids": time_ids.expand(len(index), -1),
            },
        ).sample
        loss = F.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(unet.parameters())
    ema.copy_to(unet.parameters())
    return unet.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ all


def pretrain(seed: int = 0, budget: Budget | None = None) -> StableDiffusionXLPipeline:
    """Train all parts from a seed. The caller's random state is left as it was."""
    budget = budget or Budget()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data = crawl("train", budget.crawl_size, seed)
        pixels = to_pixels(data.images)
        tokenizer = train_tokenizer()
        text_encoder, text_encoder_2 = encoders = train_text_encoders(tokenizer, data, budget.text_steps)
        vae = train_vae(pixels, budget.vae_steps)
        with torch.no_grad():
            chunks = tokenize(tokenizer, data.captions).split(500)
            prompt_embeds, pooled = map(torch.cat, zip(*(encode_text(encoders, ids) for ids in chunks), strict=True))
        scheduler = make_scheduler()
        unet = train_unet(scheduler, encode_images(vae, pixels), prompt_embeds, pooled, budget.unet_steps)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder for the pipeline")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data, the initial weights and the training")
    args = parser.parse_args(arguments)
    # More threads sum in another order, so the same seed would give other weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    pretrain(args.seed).save_pretrained(args.output_dir, safe_serialization=True)


if __name__ == "__main__":
    main()
