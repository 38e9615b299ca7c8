"""patch-span: pictures behind a vision transformer, exactly, from the gradients of its first block."""

from __future__ import annotations

from typing import ClassVar, final

import torch

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.claims import LARGEST_BOUND
from unbatch.inversion.label_fit import label_behind, labels_sent_by_head
from unbatch.inversion.patch_batches import BatchWindows, by_dense_pair
from unbatch.inversion.patch_refinement import refined
from unbatch.inversion.patches import PatchWindows, by_first_layers, by_positions
from unbatch.inversion.view import View
from unbatch.knowledge import PROTOCOL_FIELDS
from unbatch.network.dense_pair import dense_pair
from unbatch.network.patches import PatchEmbedding, first_dense_layers, patch_embedding
from unbatch.reconstruction import Reconstruction

GUESS_EXPLAINS = 0.05  # of the update, that pictures may leave which errors to first order say nothing of


@final
class PatchSpan(Attack):
    """Reads a small batch of pictures exactly out of a vision transformer, by systems in its first block's gradients.

    The layer that reads the picture in patches, E_t = W p_t + b, and what is trained and added to its tokens, are found by
    running the model, not by names. Of one picture with both gradients sent,

        dL/dW = D^T P,  D = dL/d positions [T, width],  P the patches [T, p],

    is solved for P: exact for up to width - 1 patches, whatever lies above, and after local steps of SGD too. With the
    embedding frozen, the first dense layers' gradients span what they were given, the normed tokens: their complement N
    gives N^T (h_t, 1) = 0, one linear system a patch, exact where the complement has p + 1 dimensions to spare. Where the
    embedding is trained and the positions are not, Newton's method goes on from there to the last digits.

    Of n pictures these gradients tell nothing apart, but the two dense layers after attention do: their gradients' spans
    and what one sends back to the other give every token by itself, and what attention's last layer read gives its place,
    its patch by one linear system, and which picture it is of. For n T < width, p + n T + 2 < width (a class token counts
    among the T), and gradients whose rounding is below what the weakest token sends: float64 for usual sizes.

    Where dimensions of a patch are left open they are counted and stated, and a guess is returned without a claim; so are
    pictures that explain the update though its rounding is too coarse for a bound. Bound: the rounding of the gradients
    through these systems.

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
    paper: ClassVar[str] = "this library; of one picture without norms and at block 1, APRIL, Lu et al., CVPR 2022"
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
        found = self._windows(view, front, rng)
        x = torch.stack([front.picture(each, shape) for each in found.values])
        least = float(front.scale.abs().min())
        bound = (found.errors.cpu() / (least * x.flatten(1).norm(dim=1).cpu())).double()
        labels = label_behind(view, x) if len(x) == 1 else labels_sent_by_head(view, x)
        trace = found.trace | {"patches": front.tokens}
        if bool(found.errors.isfinite().all()) and float(bound.min()) >= LARGEST_BOUND:
            words = f"the update is too coarse: its errors leave {float(bound.min()):.2g} of a picture open."
            if labels is None or view.obs.fit(x, labels)[1] > GUESS_EXPLAINS:
                raise NotApplicable(words)
            bound, trace = torch.full_like(bound, torch.inf), trace | {"open": words}
        free = int(found.trace["free dimensions of a patch"])
        if free:
            trace["undetermined"] = free / front.pixel.shape[1]
        return Reconstruction(inputs=x, labels=labels, bound=bound, trace=trace)

    def _check(self, view: View) -> None:
        view.refuse_tokens()
        protocol = view.protocol
        if len(view.knowledge.input_shape) != 3:
            raise NotApplicable("the inputs are no pictures [c, h, w].")
        if view.steps and protocol.optimiser != "sgd":
            raise NotApplicable(
                f"{protocol.optimiser} rescales every entry of the update by itself, so no linear relation is left."
            )
        if view.steps > 1 and protocol.weight_decay:
            raise NotApplicable("weight decay adds the parameters themselves to the update in every local step.")

    def _windows(self, view: View, front: PatchEmbedding, rng: torch.Generator) -> BatchWindows:
        """By the positions where they were sent, else by the first dense layers, else token by token.

        Raises NotApplicable: none of them works.
        """
        n, reasons = view.knowledge.get("batch_size"), list[str]()
        if n in (None, 1):
            try:
                return _alone(by_positions(view.obs, front))
            except NotApplicable as why:
                reasons.append(str(why))
        if view.steps:
            words = "The first dense layers' inputs are one gradient's, and not of local steps."
            raise NotApplicable(" ".join([*reasons, words]))
        rough: BatchWindows | None = None
        try:
            first = first_dense_layers(view.model, front, view.knowledge.input_shape)
            if n in (None, 1):
                W = dict(view.model.named_parameters(remove_duplicate=False))[front.weight].detach().double().flatten(1)
                own = by_first_layers(view.obs, front, first, W)
                if not own.free:
                    return _alone(_refined(view, front, own))
                rough = _alone(own)
        except NotApplicable as why:
            reasons.append(f"By the first dense layers: {why}")
        try:
            first = first_dense_layers(view.model, front, view.knowledge.input_shape)
            pair = dense_pair(view.model, front.weight, view.knowledge.input_shape)
            found = by_dense_pair(view.obs, front, first, pair, rng, n)
        except NotApplicable as why:
            if rough is not None:
                return rough
            raise NotApplicable(" ".join([*reasons, f"Token by token: {why}"])) from None
        return found


def _refined(view: View, front: PatchEmbedding, found: PatchWindows) -> PatchWindows:
    """Nearer to the truth where the embedding sent its gradient, too, and the label is told by the windows as they are."""
    if front.weight not in view.update:
        return found
    x = front.picture(found.values, view.knowledge.input_shape)[None]
    label = label_behind(view, x)
    return found if label is None else refined(view.obs, front, found, label)


def _alone(found: PatchWindows) -> BatchWindows:
    """One picture's windows as those of a batch of one."""
    trace = found.trace | {"free dimensions of a patch": found.free}
    return BatchWindows(found.values[None], torch.tensor([found.error], dtype=torch.float64), trace)
