"""3a  The largest tensor of the decoder at 1024 pixels.

On a phone it is not the weights of the decoder that hurt (2.7 MB), it is what lies between its layers. Read
TinyDecoder in decoder.py with the paper's size, channels (256, 160, 160, 64), batch 1, a latent of 128x128,
float16. Three digits are enough.

LARGEST  megabytes (10^6 bytes) of the largest tensor that a layer gives or takes, if no two operations are
         fused
FIRST    the same of what the first convolution gives
"""

LARGEST = None
FIRST = None
