"""
List losses against pair losses at equal image-forwards, on the embedded world.

    trl-diffusion-rank run --recipe recipes/digits_cpo_rank4.yaml --only prompts generate score
    python benchmarks/listwise_vs_pairwise.py

Every method takes 200 steps of 40 image-forwards from the same lists of four: ten lists for the list losses, twenty
pairs (the best and the worst of a list) for `best_vs_worst`, forty images for supervised fine-tuning on the best.
The controls are that fine-tuning and lists whose ranks are shuffled. The judges were fitted on digits that neither
the model nor the scorer has seen.
"""

from digits_world import BestOnlyTrainer, run_methods


METHODS = {
    # A beta is another strength for each loss: two of each are shown
    "base": None,
    "plackett_luce (1000), shuffled ranks: control": {
        "loss_type": "plackett_luce",
        "beta": 1000.0,
        "kind": "shuffled",
    },
    "fine-tuning on the best: control": {"trainer_class": BestOnlyTrainer, "kind": "pairs"},
    "best_vs_worst (2000)": {"loss_type": "best_vs_worst", "beta": 2000.0, "kind": "pairs"},
    "best_vs_worst (1400)": {"loss_type": "best_vs_worst", "beta": 1400.0, "kind": "pairs"},
    "pairwise, all pairs (1000)": {"loss_type": "pairwise", "beta": 1000.0},
    "pairwise, all pairs (700)": {"loss_type": "pairwise", "beta": 700.0},
    "plackett_luce (1000)": {"loss_type": "plackett_luce", "beta": 1000.0},
    "plackett_luce (700)": {"loss_type": "plackett_luce", "beta": 700.0},
    "lambda (3000)": {"loss_type": "lambda", "beta": 3000.0},
    "lambda (1500)": {"loss_type": "lambda", "beta": 1500.0},
}


if __name__ == "__main__":
    run_methods(METHODS, __doc__, default_seeds=3, output="benchmarks/listwise_vs_pairwise.json")
