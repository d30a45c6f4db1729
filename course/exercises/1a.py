"""1a  Count the weights of a convolution by hand.

Step (c) of the ladder makes every 3x3 convolution separable (`conv3x3` in model.py). Take one from 256 to 512
channels. Work it out on paper first; nothing needs to be run.

FULL        numbers to learn in the full convolution, with its bias
SEPARABLE   the same of the separable one (a depthwise 3x3 without bias, then a pointwise 1x1 with one)
MACS_RATIO  how many times fewer multiply-accumulates a pixel the separable one needs (biases do not count);
            three digits are enough
"""

FULL = None
SEPARABLE = None
MACS_RATIO = None
