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

from digits_world import run_methods

from trl_diffusion_rank import DiffusionCPOConfig, DiffusionCPOTrainer
from trl_diffusion_rank.scorers import load_scorer


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
TERM = {"adversarial_adaptive": True, "adversarial_max_images": 10, "adversarial_weight": 0.5}
TERMS = {
    "": {},
    ", frozen": {**TERM, "adversarial_mode": "frozen"},
    ", joint": {
        **TERM,
        "adversarial_mode": "joint",
        "discriminator_learning_rate": 3e-4,
        "discriminator_trainable_layers": 2,
    },
}


def methods(discriminator: str) -> dict[str, dict | None]:
    """Every loss with every term; `discriminator` is the folder of the one in the loss."""
    named = {"adversarial_discriminator": discriminator}
    return {"base": None} | {
        f"{loss}{term}": {**options, **added, **(named if added else {})}
        for loss, options in LOSSES.items()
        for term, added in TERMS.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--discriminator", default="runs/digits_rank4/discriminator", help="the one in the loss")
    parser.add_argument("--second", default="runs/second", help="one that takes no part, whose score is in the table")
    folders, _ = parser.parse_known_args()  # `run_methods` parses the rest and refuses what nobody knows
    run_methods(
        methods(folders.discriminator),
        __doc__,
        default_seeds=1,
        output="benchmarks/adversarial.json",
        run_dir="runs/digits_rank4",
        second=lambda: load_scorer("discriminator", model=folders.second),
        parents=[parser],
    )
