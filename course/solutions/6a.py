"""6a  float16 has 10 bits after the leading one: 1024 numbers between 512 and 1024, half a unit apart."""

MEGABYTES_16 = 379.7 * 16 / 8
MEGABYTES_6 = 379.7 * 6 / 8
LARGEST_SQUARE = int(65504**0.5)
SPACING = (1024 - 512) / 2**10
