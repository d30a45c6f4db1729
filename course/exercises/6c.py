"""6c  Write the mask as numbers.

A phone's programs take no booleans as inputs. The mask comes as 1 for real tokens and 0 for padding, in
float16. What do you add to the logits of attention, so that real tokens stay as they are, padding gets no
weight whatever its logit is (say up to 100), and nothing becomes NaN?
"""


def as_bias(mask):
    """mask (B, T) of 0 and 1, float16 -> what is added to the logits (B, T), float16"""
    raise NotImplementedError  # your code
