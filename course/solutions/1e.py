"""1e  The commands of the exercise, one thread, seed 0: val_loss 0.527 for a and 0.909 for f. At class scale the first step learns
much faster (page 1, "What it learns at class scale");
at the paper's size the last one is as good. Did you guess otherwise? So did we."""

RUN_A = "runs/1e-a"
RUN_F = "runs/1e-f"
LOWER_LOSS = "a"
FASTER = "f"
