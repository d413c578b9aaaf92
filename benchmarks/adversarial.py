"""
A discriminator in the loss, on the embedded world: none, frozen and joint, beside behaviour cloning, DPO and CPO.

    trl-diffusion-rank run --recipe recipes/digits_rank4.yaml
    trl-diffusion-rank discriminator --dataset_name runs/digits_rank4/generate --output_dir runs/second \\
        --recipe recipes/digits_rank4.yaml --seed 7
    python benchmarks/adversarial.py --discriminator runs/digits_rank4/discriminator --second runs/second

Every method takes 200 steps of 40 image-forwards from the same lists, which the discriminator in the loss has ranked.
The term has a weight relative to the loss's own gradient (`adversarial_adaptive`). `second` is the mean score of a
discriminator of the same kind that was trained with another seed and another share of the captions: it took no part,
but it is no stranger to what the first one likes.
"""

import argparse
import sys

from digits_world import run_methods

from trl_diffusion_rank import DiffusionCPOConfig, DiffusionCPOTrainer
from trl_diffusion_rank.scorers import load_scorer


parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--discriminator", default="runs/digits_rank4/discriminator")
parser.add_argument("--second", default="runs/second")
folders, rest = parser.parse_known_args()
sys.argv[1:] = rest

LOSSES = {
    "behaviour cloning": {"loss_type": "plackett_luce", "loss_weights": [0.0], "sft_weight": 1.0, "beta": 700.0},
    "plackett_luce (700)": {"loss_type": "plackett_luce", "beta": 700.0},
    "CPO (500)": {
        "trainer_class": DiffusionCPOTrainer,
        "config_class": DiffusionCPOConfig,
        "loss_type": "plackett_luce",
        "beta": 500.0,
        "cpo_alpha": 0.2,
    },
}
TERM = {
    "adversarial_discriminator": folders.discriminator,
    "adversarial_adaptive": True,
    "adversarial_max_images": 10,
}
TERMS = {
    "": {},
    ", frozen": {**TERM, "adversarial_mode": "frozen", "adversarial_weight": 0.5},
    ", joint": {
        **TERM,
        "adversarial_mode": "joint",
        "adversarial_weight": 0.5,
        "discriminator_learning_rate": 3e-4,
        "discriminator_trainable_layers": 2,
    },
}
METHODS = {"base": None} | {
    f"{loss}{term}": {**options, **added} for loss, options in LOSSES.items() for term, added in TERMS.items()
}


if __name__ == "__main__":
    run_methods(
        METHODS,
        __doc__,
        default_seeds=1,
        output="benchmarks/adversarial.json",
        run_dir="runs/digits_rank4",
        second=lambda: load_scorer("discriminator", model=folders.second),
    )
