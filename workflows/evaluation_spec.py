"""What is judged of a served cascade."""

from typing import Literal

from pydantic import Field

from dd_core.spec import Spec
from workflows.grammar import Case, cases


class EvaluationSpec(Spec):
    """How many captions are judged, and how they are asked for."""

    kind: Literal["evaluation"] = "evaluation"
    captions: int = Field(320, ge=4)
    """Three eighths each of one and of two objects, a quarter with shape-colour pairs never seen together."""
    seed: int = 0
    """Of the choice of captions; picture i is painted with seed + i."""
    concurrency: int = Field(32, ge=1)
    """Requests under way at once."""
    timeout_s: float = Field(600, gt=0)
    """For one picture, waiting and repeats included."""

    def cases(self) -> list[Case]:
        """The captions, and what each says."""
        unseen = self.captions // 4
        one = (self.captions - unseen) // 2
        counts = {"one_object": one, "two_object": self.captions - unseen - one, "unseen": unseen}
        return cases(counts, seed=self.seed)
