"""6a  What fits into a phone, and into a half-precision number. Three digits are enough.

MEGABYTES_16    10^6 bytes of the UNet's 379.7 million weights in 16 bits
MEGABYTES_6     the same in 6 bits (tables not counted)
LARGEST_SQUARE  the largest whole number whose square does not overflow float16 (its largest number is 65504)
SPACING         the distance of two neighbouring float16 numbers just below 1000: why the time embedding,
                cosines and sines of up to 1000 radians, stays in float32
"""

MEGABYTES_16 = None
MEGABYTES_6 = None
LARGEST_SQUARE = None
SPACING = None
