"""The 16-bit formats of Adam's moments and of split weights, against exact arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from models.sixteen_bit import MEAN, VARIANCE, FloatFormat, join, split

FORMATS = [MEAN, VARIANCE]
ids = {MEAN: "1-6-9", VARIANCE: "0-6-10"}
ALL_CODES = torch.arange(1 << 16).to(torch.int16)


def exact_value(code: int, form: FloatFormat) -> Fraction:
    """What a code means, by the definition."""
    magnitude = code & form.largest_code
    exponent, mantissa = divmod(magnitude, 1 << form.mantissa_bits)
    fraction = Fraction(mantissa, 1 << form.mantissa_bits)
    value = (
        (1 + fraction) * Fraction(2) ** (exponent - form.bias)
        if exponent
        else fraction * Fraction(2) ** (1 - form.bias)
    )
    return -value if code > form.largest_code else value


def nearest_code(value: float, form: FloatFormat) -> int:
    """The code of the nearest number, found by bisection in exact arithmetic; ties to even."""
    negative = math.copysign(1.0, value) < 0
    if negative and not form.signed:
        return 0
    sign = (1 << 15) if negative else 0
    if not math.isfinite(value):
        return sign | form.largest_code
    wanted = abs(Fraction(value))
    low, high = 0, form.largest_code
    if wanted >= exact_value(high, form):
        return sign | high
    while high - low > 1:
        middle = (low + high) // 2
        if exact_value(middle, form) <= wanted:
            low = middle
        else:
            high = middle
    below, above = wanted - exact_value(low, form), exact_value(high, form) - wanted
    if below == above:
        return sign | (low if low % 2 == 0 else high)
    return sign | (low if below < above else high)


def encode_one(value: float, form: FloatFormat) -> int:
    return int(form.encode(torch.tensor([value], dtype=torch.float32))) & 0xFFFF


@pytest.mark.parametrize("form", FORMATS, ids=ids.get)
def test_encoding_what_a_code_means_gives_the_code_back_for_all_codes(form: FloatFormat) -> None:
    values = form.decode(ALL_CODES)
    assert torch.isfinite(values).all()
    assert torch.equal(form.encode(values), ALL_CODES)
    magnitudes = values[: form.largest_code + 1]
    assert (magnitudes.diff() > 0).all()


@pytest.mark.parametrize("form", FORMATS, ids=ids.get)
def test_every_code_means_what_the_definition_says(form: FloatFormat) -> None:
    values = form.decode(ALL_CODES).tolist()
    assert all(Fraction(value) == exact_value(code, form) for code, value in enumerate(values))
    assert form.largest == values[form.largest_code]
    assert form.smallest == values[1]


@pytest.mark.parametrize("form", FORMATS, ids=ids.get)
def test_half_way_between_two_codes_the_even_one_is_taken(form: FloatFormat) -> None:
    codes = torch.arange(form.largest_code)
    values = form.decode(ALL_CODES[: form.largest_code + 1]).double()
    middles = ((values[:-1] + values[1:]) / 2).float()
    assert torch.equal(middles.double(), (values[:-1] + values[1:]) / 2)  # fp32 holds them
    even = codes + codes % 2
    assert torch.equal(form.encode(middles), even.to(torch.int16))
    below = middles.view(torch.int32) - 1  # one fp32 number towards zero
    assert torch.equal(form.encode(below.view(torch.float32)), codes.to(torch.int16))
    above = middles.view(torch.int32) + 1
    assert torch.equal(form.encode(above.view(torch.float32)), (codes + 1).to(torch.int16))


def any_float() -> st.SearchStrategy[float]:
    """By bits: exponents alike likely; and those near a format's ends more than alike."""
    bits = st.integers(0, (1 << 32) - 1).map(
        lambda pattern: torch.tensor([pattern - (1 << 31)]).int().view(torch.float32).item()
    )
    near = st.tuples(st.sampled_from([-1, 1]), st.floats(1, 2, width=32), st.integers(-72, 6)).map(
        lambda parts: parts[0] * parts[1] * 2.0 ** parts[2]
    )
    return st.one_of(bits, near).map(lambda value: torch.tensor(value).item())


@pytest.mark.parametrize("form", FORMATS, ids=ids.get)
@given(any_float())
@example(0.0)
@example(-0.0)
@example(math.inf)
@example(-math.inf)
@example(math.nan)
@example(1e-45)
@example(2.0**-68)
@example(2.0**-70)
@example(15.99)
@example(16.0)
@example(3.4e38)
def test_any_number_becomes_the_nearest_code(form: FloatFormat, value: float) -> None:
    assert encode_one(value, form) == nearest_code(value, form)


@pytest.mark.parametrize("form", FORMATS, ids=ids.get)
def test_the_error_of_a_normal_number_is_half_a_unit_at_most(form: FloatFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-59, 4, (100_000,), generator=generator)
    values = torch.ldexp(1 + torch.rand(100_000, generator=generator), exponents)
    values = values[values <= form.largest]
    error = ((form.decode(form.encode(values)) - values) / values).abs().max()
    assert float(error) <= 2.0 ** -(form.mantissa_bits + 1)


def test_the_ranges_are_those_of_the_documentation() -> None:
    assert (MEAN.largest, MEAN.smallest) == (16 - 2.0**-6, 2.0**-68)
    assert (VARIANCE.largest, VARIANCE.smallest) == (16 - 2.0**-7, 2.0**-69)


def test_a_float_format_must_fit_16_bits_and_fp32() -> None:
    with pytest.raises(ValueError, match="exponent_bits"):
        FloatFormat(exponent_bits=6, mantissa_bits=11, bias=60)
    with pytest.raises(ValueError, match="bias"):
        FloatFormat(exponent_bits=6, mantissa_bits=10, bias=120)
    with pytest.raises(ValueError, match="float32"):
        MEAN.encode(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="int16"):
        MEAN.decode(torch.zeros(1, dtype=torch.int32))


def patterns(upper: Tensor) -> Tensor:
    """fp32 numbers of all lower halves that matter beside each of the upper ones."""
    lower = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x1234])
    bits = (upper[:, None] << 16) + lower
    return bits.to(torch.int32).view(torch.float32).flatten()


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


def test_split_numbers_join_to_the_same_bits_whatever_they_are() -> None:
    values = patterns(torch.arange(1 << 16))
    assert same_bits(join(*split(values)), values)
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=generator)
    values = pattern.to(torch.int32).view(torch.float32)
    assert same_bits(join(*split(values)), values)


def test_the_first_part_of_a_split_number_is_the_nearest_bf16_number() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1 << 18, generator=generator) * 0.02
    upper, lower = split(values)
    assert upper.dtype == torch.bfloat16
    assert lower.dtype == torch.int16
    is_tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(upper[~is_tie], values[~is_tie].bfloat16())
    assert (upper[is_tie].float().abs() > values[is_tie].abs()).all()
