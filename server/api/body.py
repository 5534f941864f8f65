"""What all request bodies share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from server.api.forms import described

MAX_FIELDS = 100


def _unicode(text: str) -> str:
    """JSON can write half of a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is a lone surrogate: no valid Unicode") from None
    return text


def _whole(value: Any, lists: int = 2) -> Any:
    """1.0 as 1, also in a list, and in a list of lists; no body has deeper ones."""
    if lists and isinstance(value, list) and not {float, list}.isdisjoint(map(type, value)):
        return [_whole(each, lists - 1) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, AfterValidator(_unicode)]


class Body(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, json_schema_extra=described())

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        """As OpenAI and vLLM have it: a client may send every field of its own, most of them null.

        JSON has one kind of number, so that 1.0 is an integer; nothing else is taken for what it is not.
        """
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise ValueError(f"{len(data)} fields, at most {MAX_FIELDS} are read")
        return {k: _whole(v) for k, v in data.items() if v is not None}
