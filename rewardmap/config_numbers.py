"""Numbers that settings hold, with their ranges."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError


def _no_truth_value(value: Any) -> Any:
    """pydantic reads true as 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


NUMBER = BeforeValidator(_no_truth_value)
Real = Annotated[float, NUMBER]
Count = Annotated[int, NUMBER, Field(ge=1)]
Whole = Annotated[int, NUMBER, Field(ge=0)]
Positive = Annotated[float, NUMBER, Field(gt=0)]
NotNegative = Annotated[float, NUMBER, Field(ge=0)]
Share = Annotated[float, NUMBER, Field(gt=0, le=1)]
Beta = Annotated[float, NUMBER, Field(ge=0, lt=1)]
