"""1a  An output of the full convolution reads 3x3 pixels of all inputs; a depthwise one, of its channel."""

FULL = 256 * 512 * 9 + 512
SEPARABLE = 256 * 9 + 256 * 512 + 512
MACS_RATIO = (256 * 512 * 9) / (256 * 9 + 256 * 512)  # nearly 9: what is left is mostly pointwise
