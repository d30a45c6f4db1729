"""Weights in fewer bits: as many for all of them, or 8 for the sensitive ones and 4 for the rest.

8 bits are integers with a scale for each channel; 6 and 4 are palettes, the 64 or 16 numbers with the least squared error,
of which each weight names one. Which weights are sensitive is measured: each goes to 4 bits alone, the program is
interpreted in float32 on what its network really gets to see, and the error of its outputs is the price. Errors of
different weights hardly know of each other and add up, so those with the largest price a number are given 8 bits until
the budget is spent.

    python export_coreml.py --mixed 5        # 5 bits a weight on average
    python -m studies.bits                   # what that is good for: size against score
"""

import functools
import math

import numpy as np
import torch
from tqdm import tqdm

from coreml import mil_interpreter as mil
from coreml.mil_interpreter import ct, without_bars

LEAST = 512  # numbers; weights of so many and fewer are left as they are
LOW, HIGH = 4, 8  # bits of a mix


@without_bars()
def compress(package, bits):
    """A package (in memory) with weights of 8, 6 or 4 bits: one number for all, or {name: bits} for some, as choose() has them."""
    names = compressible(package)
    chosen = {name: bits.get(name, HIGH) for name in names} if isinstance(bits, dict) else dict.fromkeys(names, bits)
    for nbits in sorted(set(chosen.values())):
        some = [name for name, its_own in chosen.items() if its_own == nbits]
        package = compress_some(package, nbits, some)
    return package


def compress_some(package, nbits, names):
    optimize = ct.optimize.coreml
    if nbits == 8:
        how = optimize.OpLinearQuantizerConfig(mode="linear_symmetric")
        compress_weights = optimize.linear_quantize_weights
    else:
        how = optimize.OpPalettizerConfig(mode="custom", lut_function=functools.partial(palette, nbits))
        compress_weights = optimize.palettize_weights
    how.weight_threshold = LEAST
    return compress_weights(package, optimize.OptimizationConfig(op_name_configs=dict.fromkeys(names, how)))


def palette(nbits, weight):
    """(2^nbits numbers, which of them each weight takes) with the least squared error: k-means in one dimension, exactly.

    mode="kmeans" would do so from 10,000 numbers on; below, scikit-learn's stops at a tolerance, 0.2 to 0.5 dB early.
    """
    exactly = ct.models.neural_network.quantization_utils._get_kmeans_lookup_table_and_weight
    numbers, indices = exactly(nbits, weight, force_kmeans1d=True)
    return numbers.astype(weight.dtype), indices.astype(np.uint8)


def compressible(package):
    """Names of the matrices and kernels of a package: not of the tables of RoPE, and not of gains and offsets.

    By the kind of operation coremltools fails where one vector of zeros is the offset of a linear layer and of a norm.
    """
    kinds, found = {"conv", "linear", "matmul", "gather"}, ct.optimize.coreml.get_weights_metadata(package, weight_threshold=LEAST)
    return [name for name, weight in found.items()
            if weight.val.ndim > 1 and weight.val.size > LEAST and {op.op_type for op in weight.child_ops} <= kinds]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# Which weights are sensitive


def decompressed(program, compressed):
    """{name of a constant in `program`: the numbers that it has in `compressed`}, float32, of all that were compressed."""
    originals = {op.outputs[0].name: op for op in mil.operations(program)}
    found = {}
    for op in mil.operations(compressed):
        for key, var in op.inputs.items():
            maker = None if isinstance(var, list | tuple) else var.op
            if maker is not None and maker.op_type.startswith("constexpr"):
                name = originals[op.outputs[0].name].inputs[key].name
                if name not in found:
                    found[name] = torch.from_numpy(maker.materialized_val_inference()).float()
    return found


def relative_error(expected, found):
    """mean error^2 / mean expected^2 of {name: tensor}, of the output where it is largest."""
    return max(((expected[name] - found[name]).square().mean() / expected[name].square().mean()).item() for name in expected)


def price_of_each(package, examples, bits=LOW):
    """What it costs to put one weight alone into fewer bits.

    Args:
        package: a converted model in memory, its weights in 16 bits.
        examples: {input: (N, *its shape)}, see pipeline.real_inputs.

    Returns {name: {"numbers": how many the weight has, "error": relative_error() of the program's outputs}}.
    """
    program = mil.program_of(package)
    fewer = decompressed(program, mil.program_of(compress(package, bits)))
    expected, prices = mil.run_many(program, examples, "exact"), {}
    for name, weight in tqdm(fewer.items(), desc="weights, each alone in 4 bits", disable=None):
        found = mil.run_many(program, examples, "exact", weights={name: weight})
        prices[name] = {"numbers": weight.numel(), "error": relative_error(expected, found)}
    return prices


def choose(prices, average):
    """{name: 8 or 4}: 8 for those whose error a number is largest, as long as the mean of all bits stays within `average`."""
    left = round((average - LOW) / (HIGH - LOW) * sum(price["numbers"] for price in prices.values()))
    bits = dict.fromkeys(prices, LOW)
    for name in sorted(prices, key=lambda name: -prices[name]["error"] / prices[name]["numbers"]):
        if prices[name]["numbers"] <= left:
            bits[name], left = HIGH, left - prices[name]["numbers"]
    return bits


def average_bits(prices, bits):
    """Bits a number of a mix, scales and palettes apart."""
    total = sum(price["numbers"] for price in prices.values())
    return sum(prices[name]["numbers"] * n for name, n in bits.items()) / total


def decibels(error):
    """Of a relative error: 0.001 are 30."""
    return -10 * math.log10(error) if error else math.inf
