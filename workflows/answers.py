"""What an error of MLflow's, or of the place of its artifacts, says of later attempts."""

from PIL import UnidentifiedImageError

from workflows.files import GONE

LATER = (408, 429)
"""Status of requests that are to be made again."""
ABSENT, INVALID = "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"
"""MLflow's answers about a run that is not there, and, among others, one that was deleted."""


def code_of(error: Exception) -> str:
    """Which answer of MLflow's it is; empty if it is none."""
    return str(getattr(error, "error_code", ""))


def refused(error: Exception) -> bool:
    """Whether a thing cannot be read or taken, so that no later attempt would help."""
    answer = getattr(error, "response", None)  # of requests
    status = getattr(answer, "status_code", 0) or getattr(error, "get_http_status_code", lambda: 0)()
    if status:
        return 400 <= status < 500 and status not in LATER
    return isinstance(error, (PermissionError, ImportError, UnidentifiedImageError, *GONE))
