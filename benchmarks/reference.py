"""
Reference errors in advance against the reference at each step, on the embedded world: time and quality.

    trl-diffusion-rank run --recipe recipes/digits_cpo_rank4.yaml --only prompts generate score
    python benchmarks/reference.py

A run of three epochs (120 steps of ten lists of four), and a sweep of four betas of such runs. The seconds in advance
hold the pass over the dataset; the ratio is to the same runs with the reference asked at each step, in one process.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import datasets
from digits_world import evaluate, load_run, train


BETAS = (700.0, 500.0, 1000.0, 1400.0)
KINDS = {
    "at each step": {},
    "in advance, a draw for each epoch": {"precompute_ref_log_probs": True},
    "in advance, one draw": {"precompute_ref_log_probs": True, "num_reference_draws": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run_dir", default="runs/digits_cpo_rank4", help="finished run with the stages up to `score`"
    )
    args = parser.parse_args()
    lists, prompts, judge = load_run(Path(args.run_dir), parser)
    cache = Path(tempfile.mkdtemp())
    datasets.config.HF_DATASETS_CACHE = cache  # nothing is known from an earlier run
    with tempfile.TemporaryDirectory() as folder:  # images and prompts are encoded here, for all that follow
        train(lists, folder, seed=0, beta=700.0, max_steps=1)

    columns = ["reference", "one run, s", "ratio", "four betas, s", "ratio", "good@4", "good@20", "frechet@20"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    baseline: list[float] = []
    for name, options in KINDS.items():
        seconds = []
        for beta in BETAS:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                train(lists, folder, seed=0, beta=beta, max_steps=120, **options)
                seconds.append(time.perf_counter() - start)
                if beta == BETAS[0]:
                    quality = evaluate(folder, prompts, judge)
        one, sweep = seconds[0], sum(seconds)
        baseline = baseline or [one, sweep]
        cells = [name, f"{one:.1f}", f"{one / baseline[0]:.2f}", f"{sweep:.1f}", f"{sweep / baseline[1]:.2f}"]
        cells += [f"{quality[key]:.2f}" for key in ("good@4", "good@20", "frechet@20")]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))
    shutil.rmtree(cache)


if __name__ == "__main__":
    main()
