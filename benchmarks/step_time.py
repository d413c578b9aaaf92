"""
How long a training step on ranked lists takes, against the usual Diffusion-DPO script, and what each option brings.

    python benchmarks/step_time.py --size tiny      # SDXL in a twentieth of its widths, on a CPU
    python benchmarks/step_time.py --size sdxl      # SDXL at 1024 px, bfloat16, LoRA: one GPU
    python benchmarks/step_time.py --size sdxl --rows 4 --only ours "ours, reference in advance"

All on the same rows of four ranked images and the same hardware, with random weights, which cost what others do:

* `script`: the flow of diffusers' examples/research_projects/diffusion_dpo, written anew from the published formula,
  with its README's options: all six pairs of a row are pairs, so twelve images go through the denoiser for a row; each
  visit decodes and encodes its images and its prompt again, asks the reference, and checkpoints gradients.
* `ours`: RankedDiffusionDPOTrainer on encoded rows, four images for a row, no gradient checkpointing.
* `ours, reference in advance`: the same with `precompute_ref_log_probs`. What encoding and asking in advance took
  once, for a row, stands in the column `before`, in seconds, and is not part of the step.
* then `ours` with one option changed.

Every measurement has a process of its own, for memory, and the methods take turns, for fairness. Time is that of the
steps after the warm-up, the median of the repetitions with their range. `images/s` are image-forwards of the trained
model. `used` is the share of the machine's ceiling, measured as a product of large matrices, that went into what a
LoRA step needs: for each image a forward pass, a backward pass to the inputs of the same cost, and the reference's
forward pass where it is asked in the step; not recomputation nor encoding. `MiB` is the peak of memory during the
steps: the GPU's, or what the process has resident. The shares of time are from separate runs, which wait for the
device at each boundary. What doesn't fit into memory is a row that says so.

An interrupted benchmark goes on from its JSON file.
"""

import argparse
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


IMAGES = 4
DEFAULT_RESOLUTIONS = {"tiny": 256, "sd15": 512, "sdxl": 1024}
METHODS = ("script", "ours", "ours, reference in advance")
OPTIONS: dict[str, dict[str, Any]] = {  # of the trainer
    "ours": {},
    "ours, reference in advance": {"precompute_ref_log_probs": True, "num_reference_draws": 1},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "cache_latents off": {"cache_latents": False},
    "torch_compile": {"torch_compile": True},
    "channels_last": {"channels_last": True},
    "attention without SDPA": {},
    "AdamW not fused": {"optim": "adamw_torch"},
    "two loader workers": {"dataloader_num_workers": 2},
    "bf16": {"bf16": True, "use_cpu": True},  # on a CPU, where float32 is the default
    "memory not pinned": {"dataloader_pin_memory": False},  # on a GPU
}
PARTS = ("data", "encoding", "forward", "reference", "backward", "optimizer", "other")
OUT_OF_MEMORY = "out of memory"


# The rows


def ranked_rows(count: int, resolution: int) -> list[dict[str, Any]]:
    """Prompts with four smooth random images as JPEG files, from best to worst."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        files = []
        for _ in range(IMAGES):
            coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            file = io.BytesIO()
            coarse.resize((resolution, resolution), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            files.append(file.getvalue())
        letters = "".join(map(chr, generator.integers(ord("a"), ord("z") + 1, 40)))
        rows.append({"prompt": f"{index} {letters}", "images": files})
    return rows


# Where the time goes


class Parts:
    """Seconds by part. A part within a part counts for itself alone; the rest is `other`."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.open = ["other"]
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._charge()
        self.seconds.clear()

    def _charge(self) -> None:
        self.synchronize()
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - getattr(self, "since", now)
        self.since = now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._charge()
        self.open.append(name)
        try:
            yield
        finally:
            self._charge()
            self.open.pop()

    def around(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            # The reference's pass is made by what makes the trained model's
            with self("reference" if self.open[-1] == "reference" else name):
                return function(*args, **kwargs)

        return call

    def shares(self) -> dict[str, float]:
        self._charge()
        whole = sum(self.seconds.values())
        return {name: self.seconds.get(name, 0.0) / whole for name in PARTS}


class Watch:
    """Time and peak memory of the steps after the warm-up."""

    def __init__(self, warm_up: int, steps: int, parts: Parts | None):
        self.warm_up, self.steps, self.parts = warm_up, steps, parts
        self.done = 0

    def synchronize(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def begin(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":  # elsewhere the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")

    def step(self) -> None:
        self.done += 1
        if self.done == self.warm_up:
            self.synchronize()
            self.start = time.perf_counter()
            if self.parts:
                self.parts.restart()
        if self.done == self.warm_up + self.steps:
            self.synchronize()
            self.seconds = (time.perf_counter() - self.start) / self.steps
            self.shares = self.parts.shares() if self.parts else None

    def result(self) -> dict[str, Any]:
        import torch

        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        elif sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            memory = 1024 * int(status.split("VmHWM:")[1].split()[0])
        else:
            memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"seconds": self.seconds, "memory": memory, **({"shares": self.shares} if self.shares else {})}


# The two methods


def run_script(pipeline: Any, rows: list[dict], resolution: int, rows_a_step: int, watch: Watch, parts: Parts) -> None:
    """
    The script's loop. One step has all pairs of `rows_a_step` rows, each as the script's loader would give it. Its
    loss is -log sigmoid(-beta / 2 (e_w - e_l - (ref e_w - ref e_l))), one noise and one timestep for a pair
    (https://huggingface.co/papers/2311.12908, equation 14).
    """
    import numpy as np
    import torch
    import torch.nn.functional as F
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from PIL import Image

    unet, vae = pipeline.unet, pipeline.vae
    device, dtype = unet.device, unet.dtype
    is_sdxl = getattr(pipeline, "text_encoder_2", None) is not None
    for module in (unet, vae, pipeline.text_encoder, *([pipeline.text_encoder_2] if is_sdxl else [])):
        module.requires_grad_(False)
    unet.add_adapter(LoraConfig(**lora()))
    cast_training_params(unet, torch.float32)
    unet.enable_gradient_checkpointing()
    unet.train()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-2)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod.to(device)
    beta = 5000.0

    pairs = [
        (row["prompt"], row["images"][better], row["images"][worse])
        for row in rows
        for better, worse in itertools.combinations(range(IMAGES), 2)
    ]

    def to_pixels(file: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(file)).convert("RGB").resize((resolution, resolution), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def collate(batch: list[tuple]) -> tuple[torch.Tensor, list[str]]:
        files = [better for _, better, _ in batch] + [worse for _, _, worse in batch]
        return torch.stack([to_pixels(file) for file in files]), [prompt for prompt, _, _ in batch]

    def error(noisy, timesteps, conditioning, noise) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = unet(noisy, timesteps, **conditioning, return_dict=False)[0]
        return (prediction.float() - noise.float()).square().flatten(1).mean(1)

    def encode_prompts(prompts: list[str]) -> dict[str, Any]:
        encoded = pipeline.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        conditioning = {"encoder_hidden_states": encoded[0].repeat(2, 1, 1)}
        if is_sdxl:
            sizes = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], device=device)
            added = {"text_embeds": encoded[2].repeat(2, 1), "time_ids": sizes.repeat(2 * len(prompts), 1).to(dtype)}
            conditioning["added_cond_kwargs"] = added
        return conditioning

    loader = torch.utils.data.DataLoader(
        pairs, batch_size=6 * rows_a_step, shuffle=True, collate_fn=collate, drop_last=True
    )
    batches = iter(loader)
    watch.begin()
    for _ in range(watch.warm_up + watch.steps):
        with parts("data"):
            pixels, prompts = next(batches)
        with parts("encoding"), torch.no_grad():
            chunks = pixels.to(device, dtype).split(8)
            latents = torch.cat([vae.encode(chunk).latent_dist.sample() for chunk in chunks])
            latents = latents * vae.config.scaling_factor
            conditioning = encode_prompts(prompts)
        noise = torch.randn_like(latents[: len(prompts)]).repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, len(alphas_cumprod), (len(prompts),), device=device).repeat(2)
        signal = alphas_cumprod[timesteps].to(dtype).view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        with parts("forward"):
            better, worse = error(noisy, timesteps, conditioning, noise).chunk(2)
        with parts("reference"), torch.no_grad():
            unet.disable_adapters()
            ref_better, ref_worse = error(noisy, timesteps, conditioning, noise).chunk(2)
            unet.enable_adapters()
        loss = -F.logsigmoid(-0.5 * beta * (better - worse - (ref_better - ref_worse))).mean()
        with parts("backward"):
            loss.backward()
        with parts("optimizer"):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # its progress bar shows it
        watch.step()


def run_ours(
    pipeline: Any, rows: list[dict], resolution: int, rows_a_step: int, watch: Watch, parts: Parts | None, name: str
) -> float:
    """The trainer, whole. Returns the seconds a row that were spent before the first step."""
    from datasets import Dataset, Features, Image, List, Value
    from diffusers.models.attention_processor import AttnProcessor
    from peft import LoraConfig
    from transformers import TrainerCallback

    from trl_diffusion_rank import RankedDiffusionDPOConfig, RankedDiffusionDPOTrainer

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            watch.begin()
            if parts:
                optimizer.step = parts.around("optimizer", optimizer.step)

        def on_step_end(self, args, state, control, **kwargs):
            watch.step()

    features = Features({"prompt": Value("string"), "images": List(Image())})
    images = [[{"bytes": file, "path": None} for file in row["images"]] for row in rows]
    dataset = Dataset.from_dict({"prompt": [row["prompt"] for row in rows], "images": images}, features=features)
    is_gpu = pipeline.unet.device.type == "cuda"
    if name == "attention without SDPA":
        pipeline.unet.set_attn_processor(AttnProcessor())
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "bf16": is_gpu,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": rows_a_step,
            "max_steps": watch.warm_up + watch.steps,
            "resolution": resolution,
            "loss_type": "plackett_luce",
            "logging_steps": 10,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": is_gpu,
        }
        start = time.perf_counter()
        trainer = RankedDiffusionDPOTrainer(
            model=pipeline,
            args=RankedDiffusionDPOConfig(folder, **(options | OPTIONS[name])),
            train_dataset=dataset,
            peft_config=LoraConfig(**lora()),
            callbacks=[Steps()],
        )
        before = (time.perf_counter() - start) / len(rows)
        if parts:
            trainer.get_batch_samples = parts.around("data", trainer.get_batch_samples)
            trainer._latents_and_conditioning = parts.around(
                "other" if trainer.cache_latents else "encoding", trainer._latents_and_conditioning
            )
            trainer._ask = parts.around("forward", trainer._ask)
            trainer._reference_error = parts.around("reference", trainer._reference_error)
            trainer.accelerator.backward = parts.around("backward", trainer.accelerator.backward)
        trainer.train()
    return before


def lora() -> dict[str, Any]:
    return {"r": 8, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def measure(name: str, size: str, resolution: int, rows_a_step: int, warm_up: int, steps: int, by_part: bool) -> dict:
    """One method or one changed option, in this process."""
    import datasets
    import random_models
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = random_models.pipeline(size, device, torch.bfloat16 if device == "cuda" else torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rows = ranked_rows((warm_up + steps) * rows_a_step, resolution)  # one epoch: no row is met twice
    watch = Watch(warm_up, steps, None)
    parts = Parts(watch.synchronize if by_part else lambda: None)
    watch.parts = parts if by_part else None
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)  # nothing is known from an earlier run
        try:
            if name == "script":
                run_script(pipeline, rows, resolution, rows_a_step, watch, parts)
                return watch.result()
            before = run_ours(pipeline, rows, resolution, rows_a_step, watch, watch.parts, name)
            return {**watch.result(), "before": before}
        except torch.OutOfMemoryError:
            return {"error": OUT_OF_MEMORY}


def measure_machine(size: str, resolution: int) -> dict[str, Any]:
    """FLOP/s of a product of large matrices in the precision of the training, and what a forward pass takes."""
    import random_models
    import torch

    is_gpu = torch.cuda.is_available()
    device, dtype, side = ("cuda", torch.bfloat16, 8192) if is_gpu else ("cpu", torch.float32, 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        if is_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    hardware = torch.cuda.get_device_name() if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    return {
        "hardware": hardware,
        "dtype": str(dtype).removeprefix("torch."),
        "ceiling": 2 * side**3 / best,
        "flops": random_models.forward_flops(size, resolution),
    }


# Tables


def table(results: dict[str, Any], settings: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    machine, rows_a_step = results["machine"], settings["rows"]
    lines = [
        f"{settings['size']}, {settings['resolution']} px, rows of {IMAGES} images, {rows_a_step} a step; "
        f"{machine['hardware']}, {machine['dtype']}, ceiling {machine['ceiling'] / 1e12:.3g} TFLOP/s; a forward pass "
        f"of an image takes {machine['flops']['unet'] / 1e9:,.1f} GFLOP, its encoding "
        f"{machine['flops']['vae'] / 1e9:,.1f}, a prompt's {machine['flops']['text'] / 1e9:,.1f}.",
        "",
        "| method | s a step [range] | rows/s | against script | images/s | against script | used | MiB | before |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    seconds = {name: _seconds(runs) for name, runs in results["runs"].items()}
    script = statistics.median(seconds["script"]) if seconds.get("script") else None
    for name, runs in results["runs"].items():
        if not seconds[name]:
            lines.append(f"| {name} | {runs[0]['error']} |  |  |  |  |  |  |  |")
            continue
        median = statistics.median(seconds[name])
        images = rows_a_step * (12 if name == "script" else IMAGES)
        passes = 2 if name == "ours, reference in advance" else 3
        used = passes * images * machine["flops"]["unet"] / median / machine["ceiling"]
        before = [run["before"] for run in runs if "before" in run]
        cells = [
            name,
            f"{median:.3g} [{min(seconds[name]):.3g}, {max(seconds[name]):.3g}]",
            f"{rows_a_step / median:.3g}",
            f"{script / median:.2f}" if script else "",
            f"{images / median:.3g}",
            f"{images / (12 * rows_a_step) * script / median:.2f}" if script else "",
            f"{used:.0%}",
            f"{statistics.median(run['memory'] for run in runs) / 2**20:,.0f}",
            f"{statistics.median(before):.2g}" if before else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if results["parts"]:
        lines += ["", f"| share of the time | {' | '.join(PARTS)} |", "|---" * (1 + len(PARTS)) + "|"]
    for name, run in results["parts"].items():
        shares = [f"{run['shares'][part]:.0%}" for part in PARTS] if "shares" in run else [run["error"]]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _seconds(runs: list[dict[str, Any]]) -> list[float]:
    return [run["seconds"] for run in runs if "seconds" in run]


# The command


def in_a_process(*arguments: str) -> dict[str, Any]:
    """What this file prints as its last line when it measures something."""
    command = [sys.executable, str(Path(__file__)), *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode == -9:  # killed for memory
        return {"error": OUT_OF_MEMORY}
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr[-5000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def applicable(names: list[str], is_gpu: bool) -> list[str]:
    left_out = "bf16" if is_gpu else "memory not pinned"
    return [name for name in names if name != left_out]


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {"settings": settings, "machine": None, "runs": {}, "parts": {}}
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        sys.exit(
            f"{path} was measured with {results['settings']}, and this is {settings}: remove it, or name another file "
            "with --output."
        )
    return results


def save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["script", *OPTIONS]
    parser.add_argument("--size", choices=("tiny", "sd15", "sdxl"), default="tiny")
    parser.add_argument("--resolution", type=int, help="default: 256, 512 and 1024 px, what the models are for")
    parser.add_argument("--rows", type=int, default=1, help="rows of four images in a step (default: 1)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps in each process (default: 4)")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--repetitions", type=int, default=3, help="processes for each row (default: 3)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of: {', '.join(names)}")
    parser.add_argument("--output", help="JSON file (default: runs/step_time/SIZE-RESOLUTION-ROWS.json)")
    parser.add_argument("--measure", choices=["machine", *names], help=argparse.SUPPRESS)
    parser.add_argument("--by_part", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.resolution = args.resolution or DEFAULT_RESOLUTIONS[args.size]
    if args.measure == "machine":
        print(json.dumps(measure_machine(args.size, args.resolution)))
        return
    if args.measure:
        sizes = (args.size, args.resolution, args.rows, args.warm_up, args.steps)
        print(json.dumps(measure(args.measure, *sizes, args.by_part)))
        return

    settings = {name: getattr(args, name) for name in ("size", "resolution", "rows", "steps", "warm_up")}
    passed = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    path = Path(args.output or f"runs/step_time/{args.size}-{args.resolution}-{args.rows}.json")
    results = load(path, settings)
    results["machine"] = results["machine"] or in_a_process("--measure", "machine", *passed)
    chosen = applicable(args.only or names, not results["machine"]["hardware"].startswith("CPU"))
    for repetition in range(args.repetitions):
        for name in chosen:
            runs = results["runs"].setdefault(name, [])
            if len(runs) > repetition or any("error" in run for run in runs):
                continue
            print(f"{repetition + 1} of {args.repetitions}: {name}", file=sys.stderr, flush=True)
            runs.append(in_a_process("--measure", name, *passed))
            save(results, path)
    for name in chosen:
        if name in METHODS and name not in results["parts"]:
            print(f"by part: {name}", file=sys.stderr, flush=True)
            results["parts"][name] = in_a_process("--measure", name, "--by_part", *passed)
            save(results, path)
    print(table(results, settings))


if __name__ == "__main__":
    main()
