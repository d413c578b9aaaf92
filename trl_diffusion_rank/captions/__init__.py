"""Captions for images that came without one: a model describes them, `clean_caption` makes prompts of it."""

from trl_diffusion_rank.captions.captioner import Captioner
from trl_diffusion_rank.captions.clean import clean_caption, token_counter


__all__ = ["Captioner", "clean_caption", "token_counter"]
