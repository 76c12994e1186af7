"""How a served cascade is evaluated."""

from typing import Literal

from pydantic import Field

from dd_core.spec import Spec
from workflows.grammar import Case, cases
from workflows.labels import LabelSpec


class EvaluationSpec(Spec):
    """How many captions are judged, and how they are asked for."""

    kind: Literal["evaluation"] = "evaluation"
    captions: int = Field(320, ge=4)
    """Of the embedded world: three eighths with one object, three eighths with two, a quarter with
    shape-colour pairs never seen together.  Of a user's own data: as many, or fewer if there are fewer."""
    seed: int = 0
    """Of the choice of captions; picture i is painted with seed + i."""
    concurrency: int = Field(32, ge=1)
    """Requests under way at once."""
    timeout_s: float = Field(600, gt=0)
    """For one picture, waiting and repeats included."""
    judge: str = ""
    """Of a user's own data: a CLIP, as the address of a bundle, open_clip's name (`ViT-L-14/openai`) or
    MODEL:FILE.  Empty: the run's own; the cascade was trained with that, so another one judges better."""
    among: int = Field(100, ge=2)
    """Of a user's own data: how many captions R-precision compares a picture with, its own included."""
    label: LabelSpec | None = None
    """Which class each picture is asked for: that of its caption's pair.  A run takes what its cascade was
    trained with; None: no class is named."""

    def cases(self) -> list[Case]:
        """The captions, and what each says."""
        unseen = self.captions // 4
        one = (self.captions - unseen) // 2
        counts = {"one_object": one, "two_object": self.captions - unseen - one, "unseen": unseen}
        return cases(counts, seed=self.seed)
