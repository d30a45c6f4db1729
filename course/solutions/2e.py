"""2e  64 pictures are learned by heart: the loss on them falls below what any model can reach on new ones."""

RUN_FEW = "runs/2e-few"
RUN_MANY = "runs/2e-many"
LOWER_LOSS = "few"
LOWER_VAL_LOSS = "many"
