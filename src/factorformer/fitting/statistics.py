"""Statistics of a layer on calibration data: second moments of its input and of the gradient at its output.

All are exact sums over the batches given, whatever the batch size: padding positions do not count, and a layer
that is called several times in one forward pass (shared layers) is measured over all its calls together. The input
of an embedding is one-hot, so its second moment is diagonal: how often each row was looked up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from factorformer.fitting.batches import Calibration, as_batches
from factorformer.fitting.moments import LayerStatistics
from factorformer.fitting.recorder import FisherRecorder, FisherRowsRecorder, Recorder


def collect(
    model: nn.Module,
    layers: Sequence[str],
    batches: Calibration,
    *,
    moments: bool = False,
    fisher: bool = False,
    both_sides: bool = False,
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
        both_sides: measure the second moments of inputs and of the gradients at outputs (Kronecker-factored Fisher
            information) of what `objective` differentiates.
        progress: called with the number of batches done.

    Returns:
        Statistics by layer name, without the layers that no batch reached, or for `fisher` no loss.

    Raises:
        DataError: no batches, none that reaches any of the layers, a missing loss, or values that are not finite.
    """
    recorder = _recorder(model, layers, moments, fisher, both_sides)
    done = 0
    with recorder.attached():
        for batch in as_batches(model, batches):
            recorder.run(batch)
            done += 1
            if progress is not None:
                progress(done)
    recorder.check(done)
    return recorder.statistics()


def _recorder(model: nn.Module, layers: Sequence[str], moments: bool, fisher: bool, both_sides: bool) -> Recorder:
    if both_sides:
        return FisherRecorder(model, layers)
    return (FisherRowsRecorder if fisher else Recorder)(model, layers, moments=moments)


def unreached(model: nn.Module, layers: Sequence[str], batches: Calibration, *, fisher: bool = False) -> dict[str, str]:
    """Those of the layers that calibration data does not reach, and what to say of them.

    Batches are run until all layers are reached.

    Args:
        model, layers, batches: as for `collect`.
        fisher: whether the loss has to depend on them.

    Raises:
        DataError: no batches, or none that reaches any of the layers.
    """
    recorder = _recorder(model, layers, moments=False, fisher=fisher, both_sides=False)
    done = 0
    with recorder.attached():
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
