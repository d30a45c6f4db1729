"""4e  The same steps without and with a teacher.

From the same student of stage 1 (your runs/fm, or the zoo's), for the same 400 steps:

    python distill.py --losses task --steps 400 --save-every 400 --out runs/4e-alone
    python distill.py --steps 400 --save-every 400 --out runs/4e-taught

Look at val_loss (of the data's own velocity, for both) and pictures_per_second in log.csv. Worth a
discussion: what would be a fair comparison, equal steps or equal time? And what does mini-GenEval say (python
evaluate.py runs/4e-taught)?
"""

RUN_ALONE = "runs/4e-alone"
RUN_TAUGHT = "runs/4e-taught"
LOWER_VAL_LOSS = None  # "alone" or "taught"
FASTER = None  # "alone" or "taught"
