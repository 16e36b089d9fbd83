"""How a decoder stores the weights of a model. Importing this loads no model framework."""

from enum import StrEnum


class WeightFormat(StrEnum):
    """The numbers in which a decoder keeps the weights of a model. In the same, a seed gives the same text."""

    FP32 = "fp32"
    # The KV cache too.
    BF16 = "bf16"
    # Symmetric, with a scale for each output channel; activations int8 in groups of inputs, the KV cache bf16.
    INT8 = "int8"


# That of a CPU. An NVIDIA GPU with our kernels has bf16, MLX on a GPU fp32.
DEFAULT_WEIGHTS = WeightFormat.INT8
