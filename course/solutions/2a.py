"""2a  The shift multiplies t / (1 - t) by s: in logits it is a sum, n' = n + log s."""

import math

SHIFTED = 3 * 0.5 / (1 + 2 * 0.5)
BEFORE = 0.9 / (3 - 2 * 0.9)
SHARE = 0.5 * (1 + math.erf(math.log(3) / math.sqrt(2)))  # P(n + log 3 > 0)
