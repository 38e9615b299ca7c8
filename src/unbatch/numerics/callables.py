"""What numerics is handed as functions: linear maps, and a watch on the clock."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Apply = Callable[[Tensor], Tensor]  # a linear map, on vectors or on the rows of a matrix
Tick = Callable[[float], bool]  # share of the work done -> whether to go on
