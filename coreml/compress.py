"""Weights in fewer bits."""

from coreml.mil_interpreter import ct, without_bars


@without_bars()
def compress(package, nbits):
    """Weights in fewer bits: 8 as integers with a scale for each channel, 6 and 4 as palettes found by k-means."""
    optimize = ct.optimize.coreml
    if nbits == 8:
        how = optimize.OpLinearQuantizerConfig(mode="linear_symmetric")
        compress_weights = optimize.linear_quantize_weights
    else:
        how = optimize.OpPalettizerConfig(mode="kmeans", nbits=nbits, num_kmeans_workers=1)
        compress_weights = optimize.palettize_weights
    how.weight_threshold = 512
    # Matrices and kernels by their own names: not the tables of RoPE, and not gains and offsets. By the kind of operation it
    # fails where one vector of zeros is the offset of a linear layer and of a norm.
    kinds, found = {"conv", "linear", "matmul", "gather"}, optimize.get_weights_metadata(package, weight_threshold=512)
    names = [name for name, weight in found.items()
             if weight.val.ndim > 1 and {op.op_type for op in weight.child_ops} <= kinds]  # fmt: skip
    return compress_weights(package, optimize.OptimizationConfig(op_name_configs=dict.fromkeys(names, how)))
