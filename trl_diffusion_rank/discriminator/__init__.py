"""
The aesthetic discriminator: how good an image is for its caption, by a CLIP or SigLIP and a head.

Importing this package registers it with transformers, so that `AutoConfig`, `AutoModel` and `AutoProcessor` load one
from a folder or from the Hub.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from trl_diffusion_rank.discriminator.configuration import AestheticDiscriminatorConfig
from trl_diffusion_rank.discriminator.modeling import AestheticDiscriminator
from trl_diffusion_rank.discriminator.processing import AestheticDiscriminatorProcessor


__all__ = ["AestheticDiscriminator", "AestheticDiscriminatorConfig", "AestheticDiscriminatorProcessor"]

AutoConfig.register(AestheticDiscriminatorConfig.model_type, AestheticDiscriminatorConfig)
AutoModel.register(AestheticDiscriminatorConfig, AestheticDiscriminator)
AutoProcessor.register(AestheticDiscriminatorConfig, AestheticDiscriminatorProcessor)
