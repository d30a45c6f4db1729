"""2a  Where does the shift put the times?

Training times are t = sigmoid(n), n a standard normal number, and are then shifted, as in flow.py:

    t' = s t / (1 + (s - 1) t)

At class scale and at 1024 pixels s = 3. Work with paper and a table of the normal distribution, or with
Python. Three digits are enough.

SHIFTED  where t = 0.5 goes
BEFORE   which t is sent to 0.9
SHARE    the share of training times t' above 0.5
"""

SHIFTED = None
BEFORE = None
SHARE = None
