"""
What the stage `generate` costs beside the models: time outside their calls, and memory as the prompts grow.

    OMP_NUM_THREADS=1 python benchmarks/generate_overhead.py

Time, of the whole stage from reading the prompts to the finished dataset, model loading apart:

* `digits`: the shipped model. It draws a 16 px image in ten milliseconds, faster than any that matters, but such an
  image costs next to nothing to encode.
* `stub 512 px`: gives ready images of photographs after keeping a core busy for 50 ms each, which is about what
  SDXL-Turbo takes on a fast GPU; PNGs of photographs are what is slow to encode.

Memory, of a fresh process each: a stub gives 64 px images at once, four of each of 1,000 and of 20,000 prompts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace


CASES = {  # name: prompts, images of each, batch size
    "digits": (200, 4, 100),
    "stub 512 px": (200, 4, 8),
    "stub 64 px, 1,000 prompts": (1_000, 4, 16),
    "stub 64 px, 20,000 prompts": (20_000, 4, 16),
}
SECONDS_PER_IMAGE = {"stub 512 px": 0.05}


class Stub:
    """A pipeline that gives crops of two photographs, all of them different."""

    def __init__(self, size: int, seconds: float):
        import numpy as np
        import torch
        from sklearn.datasets import load_sample_images

        self.photos = [np.asarray(photo) for photo in load_sample_images().images]  # 427 x 640
        self.size, self.seconds = size, seconds
        self.matrix = torch.rand(256, 256)

    def __call__(self, prompts, num_inference_steps, generator, **_):
        from PIL import Image

        end = time.perf_counter() + self.seconds * len(prompts)
        images = []
        for one in generator:
            seed = one.initial_seed()
            photo = self.photos[seed % 2]
            top, left = seed // 2 % 27, seed // 54 % 240
            crop = Image.fromarray(photo[top : top + 400, left : left + 400] + (seed >> 20) % 7)
            images.append(crop.resize((self.size, self.size), Image.Resampling.BILINEAR))
        while time.perf_counter() < end:  # as a model: one core at work, Python's lock mostly free
            self.matrix @ self.matrix
        return SimpleNamespace(images=images)


def measure(case: str) -> dict[str, float]:
    """One case, in this process: seconds of the stage and of the pipelines' calls, images, peak memory in MB."""
    import torch
    from datasets import Dataset
    from diffusers import StableDiffusionXLPipeline

    from trl_diffusion_rank import generators
    from trl_diffusion_rank.stages.generate import GenerateArguments, main

    prompts, images, batch_size = CASES[case]
    seconds = {"calls": 0.0, "loading": 0.0}
    original_load = generators.load_generator

    def timed(name, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return call

    if case == "digits":
        model = "digits"
        StableDiffusionXLPipeline.__call__ = timed("calls", StableDiffusionXLPipeline.__call__)
        generators.load_generator = timed("loading", original_load)
        texts = ["a handwritten digit seven in red ink"]
    else:
        model = "stub"
        size = int(case.split()[1])
        Stub.__call__ = timed("calls", Stub.__call__)
        generators.load_generator = timed("loading", lambda *_: Stub(size, SECONDS_PER_IMAGE.get(case, 0.0)))
        texts = ["a photograph of a temple under trees", "a large flower"]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = {"prompt": [f"{texts[i % len(texts)]}, {i}" if model == "stub" else texts[0] for i in range(prompts)]}
        Dataset.from_dict(rows).save_to_disk(f"{folder}/prompts")
        args = GenerateArguments(
            dataset_name=f"{folder}/prompts",
            generators=[{"model": model, "num_inference_steps": [2, 4, 8, 8][:images]}],
            batch_size=batch_size,
            output_dir=f"{folder}/images",
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start = time.perf_counter()
        main(args)
        whole = time.perf_counter() - start - seconds["loading"]
        size = sum(path.stat().st_size for path in Path(folder, "images/data").iterdir()) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "images": prompts * images,
        "seconds": whole,
        "calls": seconds["calls"],
        "before": before,
        "peak": peak,
        "size": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), help="measure this one here and print JSON")
    case = parser.parse_args().case
    if case is not None:
        print(json.dumps(measure(case)))
        return
    print("| pipeline | images | seconds | outside the calls | images/s | MB before | peak MB | dataset MB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for case in CASES:
        command = [sys.executable, __file__, "--case", case]
        # This process imports nothing heavy: a child's peak memory begins at its parent's.
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{case} failed:\n{result.stderr}")
        r = json.loads(result.stdout.splitlines()[-1])
        # Beside a stub that takes no time everything is outside
        is_slow = case == "digits" or case in SECONDS_PER_IMAGE
        outside = f"{1 - r['calls'] / r['seconds']:.1%}" if is_slow else ""
        cells = [case, f"{r['images']:,}", f"{r['seconds']:.1f}", outside, f"{r['images'] / r['seconds']:.0f}"]
        cells += [f"{r[key]:,.0f}" for key in ("before", "peak", "size")]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
