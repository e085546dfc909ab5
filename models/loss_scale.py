"""The factor that keeps fp16 gradients from underflowing: one for the whole loss (paper, A.2)."""


class LossScale:
    """1 unless the precision is fp16; else halved on overflow, doubled after a time without."""

    GROWTH_STEPS = 2000  # this and the start: torch.amp.GradScaler's defaults
    START = 2.0**16

    def __init__(self, precision: str) -> None:
        self.is_used = precision == "fp16"
        self.value = self.START if self.is_used else 1.0
        self.finite_steps = 0

    def update(self, finite: bool) -> None:
        """Take in whether an update's gradients were finite."""
        if not self.is_used:
            return
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.finite_steps % self.GROWTH_STEPS == 0:
            self.value *= 2
