"""A scorer whose numbers can be told by hand, for judges."""

import numpy as np


class BrightnessScorer:
    """Mean grey value of an image, from 0 to 255, plus `offset`; none for the prompt "nothing"."""

    name = "brightness"

    def __init__(self, offset: float = 0.0):
        self.offset = offset

    def score(self, images, prompts):
        values = [np.asarray(image.convert("L")).mean() + self.offset for image in images]
        return [np.nan if prompt == "nothing" else value for value, prompt in zip(values, prompts, strict=True)]


class HalfScorer(BrightnessScorer):
    """Forgets every other image."""

    def score(self, images, prompts):
        return super().score(images[::2], prompts[::2])
