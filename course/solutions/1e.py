"""1e  The commands of the exercise, seed 0, commit 94a9f35: val_loss 0.540 for a and 0.597 for f; 164 and 211
pictures a second on one thread of an EPYC Turin beside other work. In as many steps the first one learns more
(page 1, "What it learns at class scale"); at the paper's size the last one is as good."""

RUN_A = "runs/1e-a"
RUN_F = "runs/1e-f"
LOWER_LOSS = "a"
FASTER = "f"
