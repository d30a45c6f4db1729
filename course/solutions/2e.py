"""2e  What we expect: 64 pictures are learned by heart, and new ones are not. The check believes your logs."""

RUN_FEW = "runs/2e-few"
RUN_MANY = "runs/2e-many"
LOWER_LOSS = "few"
LOWER_VAL_LOSS = "many"
