"""1e  Two steps of the ladder, trained.

Train the first and the last step of Fig. 2 at class scale, with the same 300 batches, at half the usual rate,
since at the usual one the first step does not learn. Guess first, then run:

    python train_fm.py --ladder a --lr 2.5e-3 --steps 300 --save-every 300 --out runs/1e-a
    python train_fm.py --ladder f --lr 2.5e-3 --steps 300 --save-every 300 --out runs/1e-f

Then look at val_loss and pictures_per_second in their log.csv. Worth a discussion: which would win after the
same *minutes*? And at the paper's widths?
"""

RUN_A = "runs/1e-a"
RUN_F = "runs/1e-f"
LOWER_LOSS = None  # "a" or "f": which val_loss is lower at the end
FASTER = None  # "a" or "f": which trains more pictures a second here
