"""Channel norm: what stands between a convolution and its activation."""

from __future__ import annotations

from typing import Literal

from torch import nn

NormName = Literal["batch", "group"]

MOST_GROUPS = 32  # of group norm: Wu and He, Group Normalization, ECCV 2018


def channel_norm(name: NormName | None, channels: int) -> nn.Module:
    """Batch norm, group norm or, for None, the identity, for so many channels.

    Group norm has the most groups, up to 32, that divide the channels and hold two or more each: a group of one channel
    on one pixel would be 0 whatever it is given.

    >>> channel_norm("group", 64).num_groups, channel_norm("group", 6).num_groups, channel_norm(None, 6)
    (32, 3, Identity())
    """
    if name is None:
        return nn.Identity()
    if name == "batch":
        return nn.BatchNorm2d(channels)
    fitting = (groups for groups in range(1, MOST_GROUPS + 1) if channels % groups == 0 and 2 * groups <= channels)
    return nn.GroupNorm(max(fitting, default=1), channels)
