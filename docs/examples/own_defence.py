"""A defence is middleware round the client's step; this one sends signs only."""

from typing import ClassVar, final

import unbatch
from unbatch.defence import Round, Step
from unbatch.protocol import Update


@final
class Signs(unbatch.Defence):
    """Sends the sign of every entry (signSGD)."""

    paper: ClassVar[str] = "Bernstein et al., ICML 2018"
    identity: ClassVar[str] = ""

    def wrap(self, step: Step) -> Step:
        def signed(round_: Round) -> Update:
            return {name: tensor.sign() for name, tensor in step(round_).items()}

        return signed


record = unbatch.audit(unbatch.Case.parse("photos:width=16"), attacks=["bias-ratio"], defences=[Signs()])
assert record.recovered() == set()
