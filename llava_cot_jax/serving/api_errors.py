"""Errors of the endpoint, in the form that OpenAI's clients read."""

from typing import Any

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Error that a request is answered with.

    Args:
        status: Status of HTTP.
        code: Word by which a program knows the error.
        message: One line that names the thing and the remedy.
        param: Field of the request that is meant, if it is one.
        retry_after: Seconds after which the request may be sent again; None where that helps nothing.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON has it."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = " ".join(str(self).split()).encode(errors="backslashreplace").decode()  # halves of characters
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def invalid_value(param: str, message: str) -> ApiError:
    """Return the error of a field whose value cannot be used."""
    return ApiError(400, "invalid_value", message, param=param)
