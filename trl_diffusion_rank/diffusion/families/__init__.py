"""
The kinds of model that can be trained, and how to tell them apart.

A family from outside registers its class under the entry-point group `trl_diffusion_rank.families`.
"""

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from trl_diffusion_rank.diffusion.families.base import Family
from trl_diffusion_rank.diffusion.families.flux import FluxFamily
from trl_diffusion_rank.diffusion.families.sd import StableDiffusionFamily
from trl_diffusion_rank.diffusion.families.sd3 import StableDiffusion3Family
from trl_diffusion_rank.diffusion.families.sdxl import StableDiffusionXLFamily


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "Family",
    "FluxFamily",
    "StableDiffusion3Family",
    "StableDiffusionFamily",
    "StableDiffusionXLFamily",
    "available_families",
    "recognise_family",
]

BUILT_IN: dict[str, type[Family]] = {
    family.name: family
    for family in (StableDiffusionFamily, StableDiffusionXLFamily, StableDiffusion3Family, FluxFamily)
}


def available_families() -> dict[str, type[Family]]:
    """Name to class: the built-in families, then those of installed packages, which may replace a built-in one."""
    external = {point.name: point.load() for point in entry_points(group="trl_diffusion_rank.families")}
    return {**BUILT_IN, **external}


def recognise_family(pipeline: "DiffusionPipeline") -> Family:
    """The family of a pipeline, told from its components, not from its name. Raises `ValueError` if there is none."""
    families = available_families()
    for family in reversed(families.values()):
        if family.recognises(pipeline):
            return family(pipeline)
    raise ValueError(
        f"No family knows how to train a `{type(pipeline).__name__}` with components "
        f"{sorted(name for name, component in pipeline.components.items() if component is not None)}. Known families: "
        f"{', '.join(families)}; others can be registered under the entry-point group `trl_diffusion_rank.families`."
    )
