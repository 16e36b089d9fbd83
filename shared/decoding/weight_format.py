"""How a decoder stores the weights of a model. Importing this loads no model framework."""

from enum import StrEnum


class WeightFormat(StrEnum):
    """The numbers of a decoder's weights. In the same format, the same seed gives the same text."""

    FP32 = "fp32"
    # The upper halves of fp32 numbers; keys and values too.
    BF16 = "bf16"
    # Bytes, with a scale for each output of a product; its inputs are bytes too, and keys and values bf16.
    INT8 = "int8"


# That of a CPU. An NVIDIA GPU with our kernels has bf16, MLX on a GPU fp32.
DEFAULT_WEIGHTS = WeightFormat.INT8
