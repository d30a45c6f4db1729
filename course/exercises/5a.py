"""5a  Four steps: when, how many forwards, who teaches.

The student of stage 3 draws in four steps, evenly spaced and then shifted with s = 3
(flow.sampling_timesteps). Three digits are enough.

TIMES            the times at which a step begins, from noise on
FORWARDS_BEFORE  forwards of the UNet for a picture of stage 2: 28 steps, guidance 2
FORWARDS_AFTER   the same of stage 3: 4 steps, and guidance is inside the student
A                a_t of stage 2 at each of TIMES: where does S listen to the data, where to the teacher?
"""

TIMES = [None, None, None, None]
FORWARDS_BEFORE = None
FORWARDS_AFTER = None
A = [None, None, None, None]
