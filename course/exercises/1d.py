"""1d  Why self-attention leaves stage 2: count its scores.

At 1024 pixels the latent has 128x128 cells. Step (a) of the ladder lets the pixels of stages 2 and 3 attend
to each other. Stage 2 has 512 channels at half the latent's side, stage 3 has 896 at a quarter of it; heads
have 64 channels.

How many megabytes (10^6 bytes) do the scores of ONE attention layer take in float16, if they are all kept at
once? Three digits are enough. Compare with the 759 MB that all weights of the text-to-image model take in
float16.
"""

STAGE_2 = None
STAGE_3 = None
