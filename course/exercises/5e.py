"""5e  A discriminator that wins.

Train stage 3 for 100 steps as it is, and with heads that learn thirty times as fast and without the penalty:

    python step_distill.py --steps 100 --save-every 100 --watch 0 --ramp 0 --out runs/5e-calm python
    step_distill.py --steps 100 --save-every 100 --watch 0 --ramp 0 --heads-lr 3e-3 --penalty 0 --out
    runs/5e-wins

Look at d_real, d_fake and loss_d in log.csv, and at gan.png. Worth a discussion: what does the student learn
from a discriminator whose logits are far beyond 1 and -1, and what from one that cannot tell the sides apart?
"""

RUN_CALM = "runs/5e-calm"
RUN_WINS = "runs/5e-wins"
WIDER_GAP = None  # "calm" or "wins": d_real - d_fake in the last row
LOWER_LOSS_D = None  # "calm" or "wins": loss_d in the last row
