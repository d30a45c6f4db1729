"""3e  Who tries to please a discriminator is further from the original: by 0.3 dB (one thread, seed 0)."""

RUN_WITHOUT = "runs/3e-without"
RUN_MUCH = "runs/3e-much"
HIGHER_PSNR = "without"
