"""4c  With a ratio for each picture the derivative is 2 / d: who agrees better pulls harder."""

NEAR = (1 / 0.01**2) * 2 * 0.01
FAR = (1 / 1**2) * 2 * 1
ratio = 1 / ((0.01**2 + 1**2) / 2)
RUNNING_NEAR = ratio * 2 * 0.01
RUNNING_FAR = ratio * 2 * 1
