"""Statistics of a layer on calibration data: the second moment of its input, and its Fisher rows.

Both are exact sums over the batches given, whatever the batch size: padding positions do not count, and a layer
that is called several times in one forward pass (shared layers) is measured over all its calls together. The input
of an embedding is one-hot, so its second moment is diagonal: how often each row was looked up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from factorformer.errors import DataError
from factorformer.fitting.batches import Batch, Calibration, as_batches
from factorformer.fitting.fisher import fisher_rows
from factorformer.fitting.linalg import square_root
from factorformer.layers.modes import evaluating

_CROSSING = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)\b.*\b(k|v|key|value|k_proj|v_proj)$"
)
"""Layers of a decoder that read what the encoder wrote."""

UNSEEN = 0.1
"""Look-ups granted to every row of an embedding, relative to the mean of those counted.

Ours, from one experiment on MiniLM's word embeddings: much less forgets the words of other domains, much more costs
accuracy in the domain that was calibrated on.
"""


@dataclasses.dataclass
class InputMoment:
    """Second moment `C = X^T X / n` of a layer's input `X: (n, width)`; layers that read the same tensor share it.

    Args:
        total: `X^T X` in float64, `(width, width)`.
        count: number of input rows seen, padding excluded.
    """

    total: Float[Tensor, "width width"]
    count: int = 0
    _root: Tensor | None = dataclasses.field(default=None, repr=False)

    def moment(self) -> Float[Tensor, "width width"]:
        """`C`, regularized so that it is positive definite.

        Fewer rows than columns leave directions of the input unseen, whose error would then cost nothing. As in Ledoit
        and Wolf (2004) the estimate is shrunk towards a multiple of the identity. The weight of that, ours,
        `0.03 * width / (width + count)`, falls as directions are seen more often. On MiniLM's embeddings, factors of
        0.001 to 0.1 in its place did equally well with 30 and with 100 sentences, and 0.3 and 1 did worse.
        """
        width = len(self.total)
        weight = 0.03 * width / (width + self.count)
        moment = self.total * ((1 - weight) / max(self.count, 1))
        scale = self.total.diagonal().mean() / max(self.count, 1)
        # An input of zeros only makes no direction matter more than another.
        moment.diagonal().add_(weight * scale if scale > 0 else 1)
        return moment

    def root(self) -> Float[Tensor, "width width"]:
        """Lower-triangular square root of `moment()`, computed once."""
        if self._root is None:
            self._root = square_root(self.moment())
        return self._root


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer; a field that was not asked for is None.

    Args:
        inputs: second moment of the layer's input; None for an embedding.
        rows: importance of each row of the weight, `(out,)`: Fisher rows, or how often an embedding's row was used.
    """

    inputs: InputMoment | None = None
    rows: Float[Tensor, " out"] | None = None


def collect(
    model: nn.Module,
    layers: Sequence[str],
    batches: Calibration,
    *,
    moments: bool = False,
    fisher: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, LayerStatistics]:
    """Run calibration batches through the model and measure its layers.

    Args:
        model: left as it was, mode and gradients included.
        layers: names of linear layers with an input of `(..., width)`, and of embeddings.
        batches: keyword arguments of the model; for `fisher` they contain labels, so that the model returns a loss.
        moments: measure the second moment of every layer's input (DRONE, NeurIPS 2021; SVD-LLM, ICLR 2025).
        fisher: measure Fisher rows (FWSVD, ICLR 2022): for each row the sum over its weights of the mean squared
            gradient of one example. The model's loss is taken to be a mean over the examples of a batch; where labels
            are of tokens, examples run one by one.
        progress: called with the number of batches done.

    Returns:
        Statistics by layer name, without the layers that no batch reached, or for `fisher` no loss.

    Raises:
        DataError: no batches, none that reaches any of the layers, a missing loss, or values that are not finite.
    """
    recorder = _Recorder(model, layers, moments, fisher)
    done = 0
    with recorder.attached(), torch.set_grad_enabled(fisher):
        for batch in as_batches(model, batches):
            recorder.run(batch)
            done += 1
            if progress is not None:
                progress(done)
    recorder.check(done)
    return recorder.statistics()


def unreached(model: nn.Module, layers: Sequence[str], batches: Calibration, *, fisher: bool = False) -> dict[str, str]:
    """Those of the layers that calibration data does not reach, and what to say of them.

    Batches are run until all layers are reached.

    Args:
        model, layers, batches: as for `collect`.
        fisher: whether the loss has to depend on them.

    Raises:
        DataError: no batches, or none that reaches any of the layers.
    """
    recorder = _Recorder(model, layers, moments=False, fisher=fisher)
    done = 0
    with recorder.attached(), torch.set_grad_enabled(fisher):
        for batch in as_batches(model, batches):
            recorder.run(batch)
            done += 1
            if len(recorder.reached) == len(layers):
                break
    recorder.check(done)
    return unreached_parts([name for name in layers if name not in recorder.reached], recorder.reached)


def unreached_parts(layers: Iterable[str], reached: Iterable[str]) -> dict[str, str]:
    """Why layers that no calibration data reaches stay dense: the same words for all layers of one part of the model.

    >>> list(unreached_parts(["vision.0.up", "vision.0.down"], ["text.0.up"]).values())[0]
    "not reached by the calibration data; exclude 'vision.*', or calibrate on data that reaches it"
    """
    met = {".".join(parts[:end]) for name in reached for parts in [name.split(".")] for end in range(len(parts) + 1)}
    part: dict[str, str] = {}
    for name in layers:
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if name not in met:
            part[name] = next(prefix for prefix in prefixes if prefix not in met)
    alike: dict[str, set[str]] = {}
    for outer in part.values():
        alike.setdefault(re.sub(r"\d+", "*", outer), set()).add(outer)
    reasons = {}
    for name, outer in part.items():
        pattern = re.sub(r"\d+", "*", outer)
        if len(alike[pattern]) == 1:
            what = f"exclude '{outer}{'' if outer == name else '.*'}'"
        else:
            what = f"{len(alike[pattern])} parts such as '{outer}'; exclude them"
        reasons[name] = f"not reached by the calibration data; {what}, or calibrate on data that reaches it"
    return reasons


class _Recorder:
    """Forward hooks that accumulate second moments, and buffer calls until the backward pass for Fisher rows."""

    def __init__(self, model: nn.Module, layers: Sequence[str], moments: bool, fisher: bool) -> None:
        self.model = model
        self.layers = {name: model.get_submodule(name) for name in layers}
        self.want_moments, self.want_fisher = moments, fisher
        self.moments: dict[str, InputMoment] = {}
        self.rows: dict[str, Tensor] = {}
        self.reached: set[str] = set()
        self.examples = 0
        self._batch: Batch = {}
        self._size = 0
        self._last: tuple[Tensor, InputMoment] | None = None
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        # Tied layers of one kind are one: T5 never calls the `shared` embedding itself.
        handles = [
            module.register_forward_hook(self._hook(name, path))
            for path, module in self.model.named_modules()
            for name, layer in self.layers.items()
            if type(module) is type(layer) and module.weight is layer.weight
        ]
        # Gradients with respect to outputs exist only downstream of something that requires them.
        frozen = [p for m in self.layers.values() for p in m.parameters() if self.want_fisher and not p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with evaluating(self.model):
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for handle in handles:
                handle.remove()

    def check(self, batches: int) -> None:
        """Raise `DataError` if there were no batches, or none that reached a layer."""
        if batches == 0:
            raise DataError(
                "calibration data is empty: give at least one batch, and a list where both plan and compress read it"
            )
        if self.layers and not self.reached:
            name = next(iter(self.layers))
            raise DataError(f"no layer is reached by the calibration data: not '{name}', nor any other in scope")

    def _hook(self, name: str, path: str) -> Callable[[nn.Module, Any, Any], Tensor]:
        return lambda _, inputs, output: self._see(name, path, inputs[0], output)

    def run(self, batch: Batch) -> None:
        """One forward pass, and one backward if Fisher rows are wanted."""
        device = next(self.model.parameters()).device
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        self._size = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)
        labels = batch.get("labels")
        if self.want_fisher and self._size > 1 and labels is not None and labels.dim() > 1:
            # A loss over tokens is a mean over those of the whole batch: only alone has an example its own.
            for row in range(self._size):
                self.run({k: v[row : row + 1] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()})
            return
        self._batch, self._last, self._calls = batch, None, {}
        try:
            output = self.model(**batch)
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            given = ", ".join(f"{k} {tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in batch.items())
            raise DataError(
                f"{type(self.model).__name__} cannot run on a calibration batch of {given}: {error}"
            ) from error
        self._last = None
        if self.want_fisher:
            self._add_fisher(output)

    def _see(self, name: str, path: str, x: Tensor, output: Tensor) -> Tensor:
        layer = self.layers[name]
        if not self.want_fisher:
            self.reached.add(name)
        if isinstance(layer, nn.Embedding) and x.dim() == 2 and len(x) == 1 < self._size:
            # Positions are looked up once for the whole batch; repeated, they have a gradient for every example.
            x, output = x.expand(self._size, -1), output.expand(self._size, -1, -1)
        if self.want_fisher:
            self._calls.setdefault(name, []).append((x.detach(), output))
        elif isinstance(layer, nn.Embedding):
            rows = self._without_padding(path, x, x.shape)
            self._add_rows(name, torch.bincount(rows, minlength=layer.num_embeddings).double())
        if self.want_moments and not isinstance(layer, nn.Embedding):
            self._add_moment(name, path, x)
        return output

    def _add_moment(self, name: str, path: str, x: Tensor) -> None:
        # Query, key and value are called in a row with one tensor object: its second moment is computed once.
        last = self._last
        if last is not None and last[0] is x and self.moments.setdefault(name, last[1]) is last[1]:
            return
        known = self.moments.get(name)
        if known is None:
            known = InputMoment(torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device))
            self.moments[name] = known
        rows = self._without_padding(path, x.detach(), x.shape[:-1]).float()
        known.total += (rows.T @ rows).double()
        known.count += len(rows)
        self._last = (x, known)

    def _add_rows(self, name: str, rows: Tensor) -> None:
        self.rows[name] = self.rows[name] + rows if name in self.rows else rows

    def _without_padding(self, path: str, x: Tensor, positions: torch.Size) -> Tensor:
        config = getattr(self.model, "config", None)
        decoding = getattr(config, "is_encoder_decoder", False) and "decoder" in path and not _CROSSING.search(path)
        mask = self._batch.get("decoder_attention_mask" if decoding else "attention_mask")
        if mask is not None and mask.shape == positions:
            return x[mask.bool()]
        if mask is not None and positions == (mask.numel(),):  # OPT folds batch and positions into one dimension
            return x[mask.flatten().bool()]
        return x.flatten(0, len(positions) - 1)

    def _add_fisher(self, output: object) -> None:
        loss = getattr(output, "loss", None)
        if loss is None:
            raise DataError(
                f"Fisher rows need a loss, but {type(self.model).__name__} returned none: "
                "give calibration batches with labels, to a model with a task head"
            )
        self.examples += self._size
        calls = [(name, x, y) for name, seen in self._calls.items() for x, y in seen]
        if calls and loss.requires_grad:
            for name, rows in fisher_rows(loss, calls, self.layers, self._size).items():
                self.reached.add(name)
                self._add_rows(name, rows)
        self._calls = {}

    def statistics(self) -> dict[str, LayerStatistics]:
        result = {}
        for name in [name for name in self.layers if name in self.reached]:
            moment, rows = self.moments.get(name), self.rows.get(name)
            for values in (moment.total if moment else None, rows):
                if values is not None and not torch.isfinite(values).all():
                    raise DataError(f"layer '{name}' sees NaN or infinite values on the calibration data")
            if rows is not None and self.want_fisher:
                rows = rows.clamp_min(0) / self.examples
            elif rows is not None:
                # Words that calibration never saw will be met: each counts as a tenth of the mean word.
                rows = rows + UNSEEN * rows.mean()
            result[name] = LayerStatistics(moment, rows)
        return result
