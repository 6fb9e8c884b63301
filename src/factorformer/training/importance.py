"""How much each removable part of a matrix matters for the loss, from gradients that training computes anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Score = Literal["first_order", "element_wise", "uncertainty"]
UNIT = "unit"


class Importance:
    """Moving averages of the importance of units, and of how much it varies.

    A unit is a product of factors, such as `s_i u_i v_i^T`. With `p` its parameters in one factor and `g` their
    gradients, `p . g = s_i dL/ds_i`, whichever factor it is: the first-order estimate of the change of the loss when
    the unit is removed.

    - `first_order`: the moving average of `|p . g|`, one number for each unit.
    - `element_wise`: that, and for each factor the mean over `|p g|` of its entries, the sensitivity of AdaLoRA (Zhang
      et al., ICLR 2023, arXiv 2303.10512).
    - `uncertainty`: the same, each moving average `I` multiplied by that of its deviation `|I_now - I|`, as AdaLoRA
      has it from PLATON.

    Args:
        score: which of them.
        smoothing: what each step leaves of the averages before.
    """

    def __init__(self, score: Score, smoothing: float) -> None:
        self.score, self.smoothing = score, smoothing
        self.averages: dict[str, Tensor] = {}
        self.deviations: dict[str, Tensor] = {}

    @property
    def one_factor_tells(self) -> bool:
        """Whether products of a single factor are enough."""
        return self.score == "first_order"

    def update(self, products: Mapping[str, Float[Tensor, "units entries"]]) -> None:
        """Take in the products of parameters and gradients of one step; steps that are not finite do not count."""
        first = next(iter(products.values()))
        now = {UNIT: first.sum(1, keepdim=True).abs()}
        if not self.one_factor_tells:
            now |= {name: product.abs() for name, product in products.items()}
        if not all(torch.isfinite(values.sum()) for values in now.values()):
            return
        for kept in (self.averages, self.deviations):  # the model may have moved since
            kept.update({name: tensor.to(first.device) for name, tensor in kept.items()})
        for name, values in now.items():
            average = self.averages.get(name)
            if average is None:
                self.averages[name] = values.float()
                if self.score == "uncertainty":
                    self.deviations[name] = torch.zeros_like(self.averages[name])
                continue
            average.lerp_(values.float(), 1 - self.smoothing)
            if self.score == "uncertainty":
                self.deviations[name].lerp_((values - average).abs(), 1 - self.smoothing)

    def scores(self) -> Float[Tensor, " units"]:
        """One number for each unit, not negative."""
        parts = self.averages
        if any(deviation.any() for deviation in self.deviations.values()):  # none after a single look
            parts = {name: average * self.deviations[name] for name, average in parts.items()}
        return torch.stack([part.mean(1) for part in parts.values()]).sum(0)

    def keep(self, kept: Int[Tensor, " units"]) -> None:
        """Forget the units that were removed."""
        for values in (self.averages, self.deviations):
            for name, tensor in values.items():
                values[name] = tensor[kept]

    def state_dict(self) -> dict[str, Tensor]:
        """All averages, by name."""
        return {f"{kind}.{name}": t for kind, values in self._kinds() for name, t in values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned."""
        for kind, values in self._kinds():
            values.clear()
            values.update(
                {name.removeprefix(f"{kind}."): t for name, t in state.items() if name.startswith(f"{kind}.")}
            )

    def _kinds(self) -> tuple[tuple[str, dict[str, Tensor]], ...]:
        return ("averages", self.averages), ("deviations", self.deviations)
