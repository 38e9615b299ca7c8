"""patch-span: a picture behind a vision transformer, exactly, from the gradients of its first layers."""

from __future__ import annotations

from typing import ClassVar, final

import torch

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.claims import LARGEST_BOUND
from unbatch.inversion.label_fit import label_behind
from unbatch.inversion.patches import PatchWindows, by_first_layers, by_positions
from unbatch.inversion.view import View
from unbatch.knowledge import PROTOCOL_FIELDS
from unbatch.network.patches import PatchEmbedding, first_dense_layers, patch_embedding
from unbatch.reconstruction import Reconstruction


@final
class PatchSpan(Attack):
    """Reads one picture exactly out of a vision transformer: each patch by a linear system in the first layers' gradients.

    The layer that reads the picture in patches, E_t = W p_t + b, and what is trained and added to its tokens, are found by
    running the model, not by names. With both gradients sent,

        dL/dW = D^T P,  D = dL/d positions [T, width],  P the patches [T, p],

    is solved for P: exact for up to width - 1 patches, whatever lies above, and after local steps of SGD too. With the
    embedding frozen, the first dense layers' gradients span what they were given, the normed tokens: their complement N
    gives N^T (h_t, 1) = 0, one linear system a patch. It is exact where the complement has p + 1 dimensions to spare; else
    the dimensions that are left open are counted and stated, and a guess is returned without a claim.

    Bound: the rounding of the gradients over the least singular value of the system. Batches of more than one picture
    mix their patches, and are refused with their number.

    >>> import unbatch
    >>> from unbatch.models.vision_transformer import build_vision_transformer
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = build_vision_transformer((1, 8, 8), 3, depth=1, width=24, rng=rng)  # 16 patches of 2 x 2
    >>> x, y = torch.rand(1, 1, 8, 8, generator=rng), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> found = unbatch.attacks.PatchSpan()(seen)
    >>> torch.allclose(found.inputs, x.double(), atol=1e-3), found.labels
    (True, tensor([2]))
    """

    family: ClassVar[str] = "span"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.SOLVES
    paper: ClassVar[str] = "this library; without norms and at block 1, APRIL, Lu et al., CVPR 2022"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"batch_size", "clients", "buffers", "labels", "noise"}) | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(
        case="photos:model=vit,width=48,depth=1,size=8", floors={"l2-error": 1e-3, "psnr": 60.0}
    )

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        shape = view.knowledge.input_shape
        view = view.gradient
        self._check(view)
        front = patch_embedding(view.model, shape)
        windows = self._windows(view, front)
        x = front.picture(windows.values, shape)[None]
        least = float(front.scale.abs().min())
        bound = torch.tensor([windows.error / (least * float(x.norm()))], dtype=torch.float64)
        if not windows.free and float(bound) >= LARGEST_BOUND:
            raise NotApplicable(f"the update is too coarse: its errors leave {float(bound):.2g} of the picture open.")
        label = label_behind(view, x)
        trace = windows.trace | {"patches": front.tokens, "free dimensions of a patch": windows.free}
        if windows.free:
            trace["undetermined"] = windows.free / front.pixel.shape[1]
        return Reconstruction(inputs=x, labels=label, bound=bound, trace=trace)

    def _check(self, view: View) -> None:
        view.refuse_tokens()
        n, protocol = view.knowledge.get("batch_size", 1), view.protocol
        if len(view.knowledge.input_shape) != 3:
            raise NotApplicable("the inputs are no pictures [c, h, w].")
        if n > 1:
            raise NotApplicable(f"the batch has {n} examples, whose patches the gradients mix.")
        if view.steps and protocol.optimiser != "sgd":
            raise NotApplicable(
                f"{protocol.optimiser} rescales every entry of the update by itself, so no linear relation is left."
            )
        if view.steps > 1 and protocol.weight_decay:
            raise NotApplicable("weight decay adds the parameters themselves to the update in every local step.")

    def _windows(self, view: View, front: PatchEmbedding) -> PatchWindows:
        """By the positions where they were sent, else by the first dense layers. Raises NotApplicable: neither works."""
        try:
            return by_positions(view.obs, front)
        except NotApplicable as why:
            first_reason = str(why)
        if view.steps:
            raise NotApplicable(
                f"{first_reason} The first dense layers' inputs are one gradient's, and not of local steps."
            )
        try:
            first = first_dense_layers(view.model, front, view.knowledge.input_shape)
            W = dict(view.model.named_parameters(remove_duplicate=False))[front.weight].detach().double().flatten(1)
            return by_first_layers(view.obs, front, first, W)
        except NotApplicable as why:
            raise NotApplicable(f"{first_reason} And by the first dense layers: {why}") from None
