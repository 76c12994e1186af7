"""`ddiff eval`: an endpoint judged by the oracle of the embedded world."""

from pathlib import Path
from typing import Any

from workflows.evaluation import evaluate_endpoint
from workflows.evaluation_spec import EvaluationSpec


def judge_endpoint(url: str, *, captions: int, seed: int, keep: Path | None = None) -> dict[str, Any]:
    """The scores of whatever is served there.

    Args:
        url: Such as http://127.0.0.1:8000.
        captions: How many, at least 4.
        seed: Of the choice of captions and of the pictures.
        keep: Directory for the pictures and what was said of each.
    """
    return evaluate_endpoint(url, EvaluationSpec(captions=captions, seed=seed), keep=keep)
