"""Tiers: how much of a private example came back, from an exact recovery down to nothing."""

from __future__ import annotations

from enum import StrEnum

from unbatch.reporting.thresholds import ALIKE_SSIM, COPY_ERROR, COPY_PSNR, EXACT, FAR_FROM_CHANCE


class Tier(StrEnum):
    """How near the nearest that attacks returned comes to one private example, worst first.

    >>> [str(tier) for tier in Tier], max(Tier.COPY, Tier.NONE, key=Tier.weight)
    (['exact', 'copy', 'recognisable', 'none found'], <Tier.COPY: 'copy'>)
    """

    EXACT = "exact"
    COPY = "copy"  # nobody would tell them apart
    RECOGNISABLE = "recognisable"  # far nearer than chance
    NONE = "none found"

    def weight(self) -> int:
        """The worse for the owner of the data, the larger."""
        return len(Tier) - list(Tier).index(self)


class Outcome(StrEnum):
    """What an audit comes to as a whole: the worst tier of an example, or why there is none.

    >>> str(Outcome.NOT_AUDITED)
    'not audited'
    """

    EXACT = "exact"
    COPY = "copy"
    RECOGNISABLE = "recognisable"
    EXPLAINED = "explained"  # no truth to compare with, but what was returned explains the update to its rounding
    FEATURES = "features"  # exact ones, of a deeper layer
    NONE = "none found"  # something was tried, and nothing of the examples came out
    NOTHING_RAN = "nothing ran"  # no attack on the examples could run
    NOT_AUDITED = "not audited"  # no reading of the captured update fits its model


def tier_of(
    error: float,
    *,
    chance: float | None = None,
    psnr: float | None = None,
    ssim: float | None = None,
    ssim_of_chance: float | None = None,
) -> Tier:
    """The tier of an example that came back with this relative l2 `error`.

    Exact: an error of at most 1e-4. Copy: of at most 1e-2, or 40 dB and more. Recognisable: an error 10 dB below that of
    `chance`, what as many prior draws come to when they are matched in the same way; or a structural similarity of at least
    .5 and more than chance's. `psnr` (in dB of the domain's range) and `ssim` are of pictures alone: of a table whose
    columns differ in size they say little.

    >>> [str(tier_of(error, chance=0.7)) for error in (2e-7, 5e-3, 0.2, 0.5)]
    ['exact', 'copy', 'recognisable', 'none found']
    >>> str(tier_of(0.02, psnr=41.0)), str(tier_of(0.4, chance=0.7, ssim=0.6, ssim_of_chance=0.1))
    ('copy', 'recognisable')
    """
    if error <= EXACT:
        return Tier.EXACT
    if error <= COPY_ERROR or (psnr is not None and psnr >= COPY_PSNR):
        return Tier.COPY
    far = chance is not None and error <= chance * 10 ** (-FAR_FROM_CHANCE / 20)
    alike = ssim is not None and ssim >= ALIKE_SSIM and (ssim_of_chance is None or ssim > ssim_of_chance)
    return Tier.RECOGNISABLE if far or alike else Tier.NONE
