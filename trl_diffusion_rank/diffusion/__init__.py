"""Models: how each family is noised, asked and decoded, where its noise comes from, how it draws."""

from transformers.utils import logging as transformers_logging


# Importing a pipeline recommends torchvision for image processors that nothing here uses; said once, to nobody
_level = transformers_logging.get_verbosity()
transformers_logging.set_verbosity_error()
import diffusers.pipelines.flux.pipeline_flux  # noqa: E402, F401


transformers_logging.set_verbosity(_level)
