"""Rounding up of whole numbers."""


def ceil_div(number: int, divisor: int) -> int:
    """Return ``number / divisor`` rounded up to a whole number."""
    return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not less than ``number``."""
    return ceil_div(number, multiple) * multiple


def round_up_to_power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less than ``number``, which is positive."""
    return 1 << (number - 1).bit_length()
