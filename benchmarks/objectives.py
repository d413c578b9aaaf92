"""
Every objective, and every safeguard in a run that is made to collapse, on the embedded world.

    trl-diffusion-rank run --recipe recipes/digits_cpo_rank4.yaml --only prompts generate score
    python benchmarks/objectives.py

Every method takes 200 steps of 40 image-forwards from the same lists of four, each loss at a beta that suits it. The
collapse is a learning rate more than three times too high with a small beta; its rows differ in the safeguard alone.
"""

from digits_world import run_methods

from trl_diffusion_rank import DiffusionCPOConfig, DiffusionCPOTrainer


CPO = {"trainer_class": DiffusionCPOTrainer, "config_class": DiffusionCPOConfig, "loss_type": "plackett_luce"}
COLLAPSE = {"loss_type": "plackett_luce", "beta": 200.0, "learning_rate": 1e-3, "logging_steps": 5}
METHODS = {
    "base": None,
    "plackett_luce (700)": {"loss_type": "plackett_luce", "beta": 700.0},
    "pairwise (700)": {"loss_type": "pairwise", "beta": 700.0},
    "best_vs_worst (1400)": {"loss_type": "best_vs_worst", "beta": 1400.0, "kind": "pairs"},
    "best_vs_rest (700)": {"loss_type": "best_vs_rest", "beta": 700.0},
    "top1 (700)": {"loss_type": "top1", "beta": 700.0},
    "lambda (1500)": {"loss_type": "lambda", "beta": 1500.0},
    "ipo (200)": {"loss_type": "ipo", "beta": 200.0},
    "hinge (700)": {"loss_type": "hinge", "beta": 700.0},
    "linear (250)": {"loss_type": "linear", "beta": 250.0},
    "linear (2000)": {"loss_type": "linear", "beta": 2000.0},
    "linear (250), preserve_mu 0.5": {"loss_type": "linear", "beta": 250.0, "preserve_mu": 0.5},
    "plackett_luce (700), preserve_mu 0.5": {"loss_type": "plackett_luce", "beta": 700.0, "preserve_mu": 0.5},
    "plackett_luce (700), sft_weight 0.2": {"loss_type": "plackett_luce", "beta": 700.0, "sft_weight": 0.2},
    "CPO (500), cpo_alpha 0.2": {**CPO, "beta": 500.0, "cpo_alpha": 0.2},
    "CPO (500), cpo_alpha 0": {**CPO, "beta": 500.0, "cpo_alpha": 0.0},
    "collapse: plackett_luce (200) at 1e-3": COLLAPSE,
    "collapse, preserve_mu 0.5": {**COLLAPSE, "preserve_mu": 0.5},
    "collapse, sft_weight 0.5": {**COLLAPSE, "sft_weight": 0.5},
    "collapse, dpop_lambda 1": {**COLLAPSE, "dpop_lambda": 1.0},
    "collapse, stop_on_displacement": {**COLLAPSE, "stop_on_displacement": True, "displacement_patience": 5},
}


if __name__ == "__main__":
    run_methods(METHODS, __doc__, default_seeds=1, output="benchmarks/objectives.json")
