"""6c  Large enough that exp() of it is 0, small enough for float16; minus infinity times 0 would be NaN."""


def as_bias(mask):
    return (1 - mask) * -1e4
