"""
What the adversarial term costs: time a step and peak memory, without it and in both modes.

    python benchmarks/adversarial_cost.py

DPO with LoRA on the embedded world, ten lists of four a step, a discriminator on the world's small CLIP whose head
hasn't learnt anything (the cost is the same), and random images, which cost what others do. At most ten images are
decoded a step. Each configuration has a process of its own, for memory: the GPU's peak, or what the process has
resident at most, which includes Python and PyTorch.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from PIL import Image as PILImage
from transformers import TrainerCallback

from trl_diffusion_rank import RankedDiffusionDPOConfig, RankedDiffusionDPOTrainer
from trl_diffusion_rank.digits.backbone import digits_backbone, digits_processor
from trl_diffusion_rank.discriminator import AestheticDiscriminator


WARM_UP, STEPS, ROWS, IMAGES = 5, 30, 10, 4
KINDS = {
    "none": {"adversarial_mode": "none"},
    "frozen": {"adversarial_mode": "frozen"},
    "frozen, adaptive": {"adversarial_mode": "frozen", "adversarial_adaptive": True},
    "joint": {"adversarial_mode": "joint"},
    "joint, adaptive": {"adversarial_mode": "joint", "adversarial_adaptive": True},
}


class Clock(TrainerCallback):
    """The process's own time where there is no GPU: other work on the machine isn't the term's cost."""

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter() if torch.cuda.is_available() else time.process_time()
        if state.global_step == WARM_UP:
            self.start = now
        self.end = now


def lists() -> Dataset:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (2 * ROWS, IMAGES, 16, 16, 3), dtype=np.uint8)
    rows = [
        {
            "prompt": f"{row} red digits",
            "images": [PILImage.fromarray(image) for image in pixels[row]],
            "ranks": list(range(1, IMAGES + 1)),
        }
        for row in range(2 * ROWS)
    ]
    features = Features({"prompt": Value("string"), "images": List(Image()), "ranks": List(Value("int32"))})
    return Dataset.from_list(rows, features=features)


def measure(kind: str) -> dict[str, float]:
    options = dict(KINDS[kind])
    with tempfile.TemporaryDirectory() as folder:
        if options["adversarial_mode"] != "none":
            AestheticDiscriminator.from_backbone(digits_backbone(), patch_layer=2).save_pretrained(f"{folder}/d")
            digits_processor().save_pretrained(f"{folder}/d")
            options |= {"adversarial_discriminator": f"{folder}/d", "adversarial_max_images": ROWS}
        clock = Clock()
        trainer = RankedDiffusionDPOTrainer(
            model="digits",
            args=RankedDiffusionDPOConfig(
                folder,
                per_device_train_batch_size=ROWS,
                max_steps=WARM_UP + STEPS,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                **options,
            ),
            train_dataset=lists(),
            peft_config=LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]),
            callbacks=[clock],
        )
        trainer.train()
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": (clock.end - clock.start) / STEPS, "memory": memory / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, help="one configuration, as JSON in the last line")
    only = parser.parse_args().only
    if only:
        print(json.dumps(measure(only)))
        return
    print("| term | ms a step | more | peak memory, MiB | more |\n|---|---|---|---|---|")
    base = None
    for kind in KINDS:
        command = [sys.executable, str(Path(__file__)), "--only", kind]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        result = json.loads(output.stdout.splitlines()[-1])
        base = base or result
        seconds, memory = (result[key] - base[key] for key in ("seconds", "memory"))
        line = f"| {kind} | {1000 * result['seconds']:.0f} | {1000 * seconds:+.0f} ({seconds / base['seconds']:+.0%}) "
        print(f"{line}| {result['memory']:.0f} | {memory:+.0f} |", flush=True)


if __name__ == "__main__":
    main()
