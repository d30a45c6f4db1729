"""1a  Each output of the full convolution reads 3x3 pixels of all inputs; a depthwise one reads 3x3 of its own channel."""

FULL = 256 * 512 * 9 + 512
SEPARABLE = 256 * 9 + 256 * 512 + 512
MACS_RATIO = (256 * 512 * 9) / (256 * 9 + 256 * 512)  # nearly 9: the pointwise part is almost all that is left
