"""What a configuration may say of numbers; for its `__post_init__`. Errors name the field, the range and the value."""

from __future__ import annotations

INFINITY = float("inf")


def check_numbers(config: object, *names: str, zero: bool = False) -> None:
    """Raise `ValueError` unless each field is a finite number greater than 0, or with `zero`, at least 0."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int | float) or not (value >= 0 if zero else value > 0) or value == INFINITY:
            least = "at least" if zero else "greater than"
            raise ValueError(f"{name} must be {least} 0 and finite, not {value!r}")


def check_counts(config: object, *names: str, least: int = 1) -> None:
    """Raise `ValueError` unless each field is a whole number of at least `least`."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number, not {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
