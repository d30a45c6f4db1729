"""3a  The last upsampler spreads 160 channels over 1024x1024 pixels; its convolution narrows them to 64."""

LARGEST = 160 * 1024 * 1024 * 2 / 1e6
FIRST = 256 * 128 * 128 * 2 / 1e6
