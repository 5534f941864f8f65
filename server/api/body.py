"""What all request bodies share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

MAX_FIELDS = 100


def _unicode(text: str) -> str:
    """JSON can write half of a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is a lone surrogate: no valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class Body(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        """As OpenAI and vLLM have it: a client may send every field of its own, most of them null."""
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise ValueError(f"{len(data)} fields, at most {MAX_FIELDS} are read")
        return {k: v for k, v in data.items() if v is not None}
