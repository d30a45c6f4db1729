"""4a  Who teaches when: a_t at three times.

    S(L_task, L_kd) = a_t L_task + (1 - a_t) sg(L_task / L_kd) L_kd

a_t is the density of the logit-normal(0, 1), that of t = sigmoid(n), divided by its largest value, which it
takes at t = 0.5. Three digits are enough.

A     [a_0.5, a_0.75, a_0.9]
PULL  what S multiplies L_kd with at t = 0.9, where L_task is 0.6 and L_kd is 0.02
"""

A = [None, None, None]
PULL = None
