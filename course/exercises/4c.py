"""4c  Why the ratio is a running mean.

Think of a picture whose velocity is off from the teacher's by d, so that L_kd = d^2, and let L_task be 1. Two
pictures are in the batch: a near one with d = 0.01 and a far one with d = 1.

First take the ratio of each picture by itself, sg(L_task / L_kd) L_kd. What is the derivative of this loss
with respect to d?
NEAR          for the near picture
FAR           for the far one

Now take one ratio for both, the mean of L_task over the mean of L_kd (as class Ratio in distill.py does, over
many steps).
RUNNING_NEAR  for the near picture
RUNNING_FAR   for the far one

Three digits are enough. Whom would the student obey, in a batch whose gradient is clipped?
"""

NEAR = None
FAR = None
RUNNING_NEAR = None
RUNNING_FAR = None
