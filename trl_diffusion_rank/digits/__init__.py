"""The embedded world: real handwritten digits in coloured ink, with captions and a small SDXL-layout pipeline."""

from pathlib import Path


__all__ = ["digits_model_path"]


def digits_model_path() -> str:
    """Folder of the shipped base pipeline, as `DiffusionPipeline.from_pretrained` takes it."""
    return str(Path(__file__).parent / "model")
