"""3e  What the discriminator costs in decibels.

Train the decoder without the adversarial loss, and with ten times as much as usual, from the first step on:

    python decoder.py --steps 800 --gan-weight 0 --gan-start 0 --out runs/3e-without
    python decoder.py --steps 800 --gan-weight 0.5 --gan-start 0 --out runs/3e-much

Then look at val_psnr in log.csv and at compare.png of both. Worth a discussion: which picture would you
rather have?
"""

RUN_WITHOUT = "runs/3e-without"
RUN_MUCH = "runs/3e-much"
HIGHER_PSNR = None  # "without" or "much"
