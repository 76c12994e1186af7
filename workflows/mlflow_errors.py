"""What an error of MLflow, or of its artifact store, says: its code, and whether a retry may help."""

from PIL import UnidentifiedImageError

from workflows.files import GONE

LATER = (408, 429)
"""HTTP status codes of requests to retry."""
ABSENT, INVALID = "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"
"""MLflow's error codes for a run that does not exist, and, among other cases, for a deleted one."""


def code_of(error: Exception) -> str:
    """MLflow's code of an error; empty if it is none of MLflow's."""
    return str(getattr(error, "error_code", ""))


def refused(error: Exception) -> bool:
    """Whether something was refused or cannot be read, so that no retry would help."""
    answer = getattr(error, "response", None)  # an error of the library requests
    status = getattr(answer, "status_code", 0) or getattr(error, "get_http_status_code", lambda: 0)()
    if status:
        return 400 <= status < 500 and status not in LATER
    return isinstance(error, (PermissionError, ImportError, UnidentifiedImageError, *GONE))
