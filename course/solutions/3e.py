"""3e  What we expect: who tries to please a discriminator is further from the original, pixel by pixel."""

RUN_WITHOUT = "runs/3e-without"
RUN_MUCH = "runs/3e-much"
HIGHER_PSNR = "without"
