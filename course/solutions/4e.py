"""4e  The commands of the exercise; the answer is what your own logs say."""

RUN_ALONE = "runs/4e-alone"
RUN_TAUGHT = "runs/4e-taught"
LOWER_VAL_LOSS = "taught"
FASTER = "alone"
