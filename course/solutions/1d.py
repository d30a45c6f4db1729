"""1d  Every pixel has a score with every other, for each head. Twice the side: sixteen times the scores."""

STAGE_2 = (512 // 64) * (64 * 64) ** 2 * 2 / 1e6
STAGE_3 = (896 // 64) * (32 * 32) ** 2 * 2 / 1e6
