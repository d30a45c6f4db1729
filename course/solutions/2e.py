"""2e  64 pictures are learned by heart, and new ones are not: val_loss 2.10 and 0.50, loss 0.12 and 0.52
(one thread, seed 0)."""

RUN_FEW = "runs/2e-few"
RUN_MANY = "runs/2e-many"
LOWER_LOSS = "few"
LOWER_VAL_LOSS = "many"
