"""5d  Write the gradient penalty R1.

A discriminator with a steep slope gives useless advice. R1 keeps it small, on real features alone:

    penalty = sum over heads of the mean over pictures and tokens of | d (sum of logits) / d feature |^2

The features are detached first: the slope is that of the heads, not of the teacher. The penalty itself must
have a gradient.
"""

import torch


def gradient_penalty(discriminator, features):
    """features: [(B, D, h, w), ...]; discriminator.logits(features) -> (B, N). Returns (penalty, logits)."""
    raise NotImplementedError  # your code
