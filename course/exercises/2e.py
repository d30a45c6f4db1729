"""2e  What a training of 64 pictures remembers.

Train twice, on 64 different pictures and on 20,000, for the same 400 steps. Before you run it: which will
have the lower loss on the pictures it trains on, and which on pictures it has never seen?

    python train_fm.py --pictures 64 --steps 400 --save-every 400 --out runs/2e-few
    python train_fm.py --pictures 20000 --steps 400 --save-every 400 --out runs/2e-many

Then look at loss and val_loss in their log.csv.
"""

RUN_FEW = "runs/2e-few"
RUN_MANY = "runs/2e-many"
LOWER_LOSS = None  # "few" or "many": the loss in the last row of log.csv
LOWER_VAL_LOSS = None  # "few" or "many": the last val_loss
