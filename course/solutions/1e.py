"""1e  The commands of the exercise, on 2 cores; the folders hold the runs."""

RUN_A = "runs/1e-a"
RUN_F = "runs/1e-f"
LOWER_LOSS = "f"
FASTER = "f"
