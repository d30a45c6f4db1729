"""5e  The commands of the exercise; the answer is what your own logs say."""

RUN_CALM = "runs/5e-calm"
RUN_WINS = "runs/5e-wins"
WIDER_GAP = "wins"
LOWER_LOSS_D = "wins"
