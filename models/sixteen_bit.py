"""Numbers of 16 bits in which an optimizer keeps its state, bit for bit.

The paper keeps Adam's running mean in 1 sign, 6 exponent and 9 mantissa bits and its running
variance in 6 and 10 (appendix B.2): the range of a gradient at the price of digits that a moving
average does not need. It does not give the exponent's bias. It does say that the largest number of
1-6-9 is slightly less than 16 (appendix E.2), which with codes spent on neither infinities nor NaN
makes the bias 60, here for both formats.

- Every code is a number: there are no infinities and no NaN. What is too large, infinities and NaN
  become the largest number of their sign.
- Encoding rounds to nearest, ties to even; decoding is exact. Numbers below 2^-59 are denormal, as
  in IEEE 754; those below half of the smallest become 0, which keeps its sign.
- A format without a sign encodes negative numbers, -0 and NaN of negative sign as 0.

Codes are stored as int16, which every backend, checkpoint and collective knows; the bits are what
counts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SINGLE_BIAS = 127
SINGLE_MANTISSA = 23
SINGLE_SIGN = -(1 << 31)
SINGLE_INFINITY = 255 << SINGLE_MANTISSA


@dataclass(frozen=True, kw_only=True)
class FloatFormat:
    """A floating-point number of 16 bits: sign if any, exponent, mantissa."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    """A number is 2^(exponent - bias) · 1.mantissa."""

    def __post_init__(self) -> None:
        if self.exponent_bits + self.mantissa_bits not in (15, 16):
            raise ValueError(
                "exponent_bits + mantissa_bits must be 16, or 15 beside a sign, "
                f"got {self.exponent_bits} + {self.mantissa_bits}"
            )
        # So that every number of the format, denormal ones too, is a normal fp32 number.
        if not 0 < SINGLE_BIAS - self.bias - self.mantissa_bits < 254 - (1 << self.exponent_bits):
            raise ValueError(f"bias must keep the format within fp32's range, got {self.bias}")

    @property
    def signed(self) -> bool:
        return self.exponent_bits + self.mantissa_bits == 15

    @property
    def largest_code(self) -> int:
        """Of a number that is not negative."""
        return (1 << (self.exponent_bits + self.mantissa_bits)) - 1

    @property
    def largest(self) -> float:
        exponent = (1 << self.exponent_bits) - 1 - self.bias
        return float(2.0**exponent * (2 - 2.0**-self.mantissa_bits))

    @property
    def smallest(self) -> float:
        """Above 0: the unit of the denormal numbers."""
        return float(2.0 ** (1 - self.bias - self.mantissa_bits))

    def encode(self, values: Tensor) -> Tensor:
        """fp32 numbers to codes, int16 of the same shape."""
        if values.dtype != torch.float32:
            raise ValueError(f"values must be float32, got {values.dtype}")
        bits = values.contiguous().view(torch.int32)
        magnitude = (bits & ~SINGLE_SIGN).clamp(max=SINGLE_INFINITY)
        dropped = SINGLE_MANTISSA - self.mantissa_bits
        # Half of the last kept bit, less one where that bit is even: a tie then rounds to even.
        half = (1 << (dropped - 1)) - 1 + ((magnitude >> dropped) & 1)
        code = (magnitude + half) >> dropped
        code = code - ((SINGLE_BIAS - self.bias) << self.mantissa_bits)
        # A multiplication by a power of two is exact, and torch.round takes ties to even.
        denormal = (values.abs().clamp(max=1.0) * (1.0 / self.smallest)).round()
        is_denormal = magnitude < (SINGLE_BIAS - self.bias + 1) << SINGLE_MANTISSA
        code = torch.where(is_denormal, denormal.int(), code).clamp(max=self.largest_code)
        is_negative = bits < 0
        if self.signed:
            code = torch.where(is_negative, code | (1 << 15), code)
        else:
            code = torch.where(is_negative, 0, code)
        return code.to(torch.int16)  # keeps the lower 16 bits

    def decode(self, codes: Tensor) -> Tensor:
        """Codes to the fp32 numbers that they are."""
        if codes.dtype != torch.int16:
            raise ValueError(f"codes must be int16, got {codes.dtype}")
        code = codes.int() & 0xFFFF
        magnitude = code & self.largest_code
        shifted = (magnitude + ((SINGLE_BIAS - self.bias) << self.mantissa_bits)) << (
            SINGLE_MANTISSA - self.mantissa_bits
        )
        is_denormal = magnitude < 1 << self.mantissa_bits
        values = torch.where(
            is_denormal, magnitude.float() * self.smallest, shifted.view(torch.float32)
        )
        return torch.where(code > self.largest_code, -values, values) if self.signed else values


MEAN = FloatFormat(exponent_bits=6, mantissa_bits=9, bias=60)
"""1-6-9: ±[2^-68, 2^4 - 2^-6]."""
VARIANCE = FloatFormat(exponent_bits=6, mantissa_bits=10, bias=60)
"""0-6-10: [2^-69, 2^4 - 2^-7]."""


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 numbers as (bfloat16, int16): the nearest bf16 number and the 16 bits that it lacks.

    `join` gives the fp32 numbers back, bit for bit, whatever they are. Ties round away from zero,
    so that the difference always fits; above bf16's largest number the first part is infinite, and
    of a NaN it need not be NaN.
    """
    if values.dtype != torch.float32:
        raise ValueError(f"values must be float32, got {values.dtype}")
    bits = values.contiguous().view(torch.int32)
    upper = ((bits >> 16) + ((bits >> 15) & 1)).to(torch.int16)
    return upper.view(torch.bfloat16), bits.to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """The fp32 numbers that `split` took apart."""
    if upper.dtype != torch.bfloat16 or lower.dtype != torch.int16:
        raise ValueError(f"must be bfloat16 and int16, got {upper.dtype} and {lower.dtype}")
    # As a signed number the lower half takes back what rounding up has added to the upper one.
    bits = (upper.contiguous().view(torch.int16).int() << 16) + lower.int()
    return bits.view(torch.float32)
