"""1e  What we expect of the commands of the exercise. The check believes your logs."""

RUN_A = "runs/1e-a"
RUN_F = "runs/1e-f"
LOWER_LOSS = "f"
FASTER = "f"
