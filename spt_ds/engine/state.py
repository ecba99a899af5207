"""What a resumed run needs to know beside its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RunState:
    """Where a run is; a checkpoint holds it as JSON."""

    step: int = 0
    """Optimizer steps taken."""
    best_nll: float = math.inf
    """The lowest validation loss of the selected prompt so far."""
    best_step: int | None = None
    """The step of that loss."""
    valid_before: dict[str, float] | None = None
    """Validation before the first step."""
    owes_validation: bool = False
    """Whether the run stopped at a step that is to be validated: it was saved at once, and is
    validated when the run resumes.
    """

    def advance(self) -> RunState:
        """The state one step later."""
        return replace(self, step=self.step + 1)

    def judge(self, valid: dict[str, float]) -> RunState:
        """The state after this step's validation: it may be the best step now."""
        state = replace(self, owes_validation=False)
        if self.step and valid["nll_selected"] < self.best_nll:
            return replace(state, best_nll=valid["nll_selected"], best_step=self.step)
        return state
