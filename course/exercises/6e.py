"""6e  Six bits and four.

Weights as indices into a palette of 64 or of 16 numbers, found by k-means:

    python export_coreml.py --nbits 6 --out build6
    python export_coreml.py --nbits 4 --out build4

Both print how far the float16 UNet is from PyTorch, in decibels, and keep it in verification.json. Look at
pictures.png of both. A rule of thumb says 6 dB a bit, as for a sound or a picture. Does it hold?
"""

BUILD_6 = "build6"
BUILD_4 = "build4"
MORE_DECIBELS = None  # 6 or 4
LOST_PER_BIT = None  # decibels of the UNet, from 6 to 4 bits, divided by 2
