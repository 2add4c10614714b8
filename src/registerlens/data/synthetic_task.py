"""The settings of the synthetic images; here apart from what draws them, so that a file is checked without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from registerlens.settings import AtLeastZero, Count, Expected, Index, Many, Settings, Whole

FlatContent = Literal["colour", "gradient", "soft_noise", "photographs"]
"""Nothing but the colour; a linear ramp; noise of low frequency; smooth places of photographs."""


class SyntheticTask(Settings):
    """The settings of the generator; the defaults are those of `registerlens:tiny`."""

    grid: Count = 6
    """Patches along each side."""
    patch: Count = 8
    """Pixels along a patch's side."""
    n_attributes: Count = 4
    """Textures summed in a normal patch."""
    n_classes: Count = 12
    """Textures to choose from for each attribute; class `n_classes` means "none", the flat patches' label."""
    n_types: Count = 4
    """Types of keys (one patch each) and of triggers."""
    n_triggers: Index = 7
    """Trigger patches in every image."""
    flats: Annotated[tuple[Index, Index], Expected("two whole numbers from 0")] = (1, 3)
    """Fewest and most flat patches in an image."""
    noise: AtLeastZero = 0.6
    """Standard deviation of the pixel noise."""
    flat_noise: AtLeastZero = 0.1
    """The same on flat patches."""
    flat_content: Many[FlatContent] = ("colour",)
    """What flat patches show beside their colour, one of these each: nothing, or content that no label asks for."""
    texture_seed: Whole = 7
    """Seed of the textures and marks themselves: part of the task, not of a batch."""

    @model_validator(mode="after")
    def _check_room(self) -> SyntheticTask:
        if self.flats[0] > self.flats[1]:
            raise ValueError(f"flats are the fewest, then the most, got {list(self.flats)}.")
        if self.n_types + self.n_triggers + self.flats[1] > self.grid**2:
            raise ValueError(
                f"{self.n_types} keys, {self.n_triggers} triggers and {self.flats[1]} flat patches are more than the "
                f"{self.grid**2} patches of a grid of {self.grid}."
            )
        return self
