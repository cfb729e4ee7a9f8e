"""A field that takes one of several things, told of in one sentence."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator


def one_of(allowed: str) -> WrapValidator:
    """What a union is annotated with: of a wrong value pydantic tells what is wrong with it for each member."""

    def in_one_line(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, bool):
            # To pydantic it is the number 1 or 0.
            raise ValueError(f"{allowed}; got {value}")
        try:
            return read(value)
        except ValidationError as error:
            # What a member says by itself, of a value of its own kind.
            own = [str(one["ctx"]["error"]) for one in error.errors() if one["type"] == "value_error"]
            raise ValueError(own[0] if own else f"{allowed}; got {str(value)[:80]}") from None

    return WrapValidator(in_one_line)
