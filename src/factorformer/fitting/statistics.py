"""Statistics of a layer on calibration data: second moments of its input and of the gradient at its output.

All are sums over the batches given: padding positions do not count, and a layer that is called several times in one
forward pass (shared layers) is measured over all its calls together. The input of an embedding is one-hot, so its
second moment is diagonal: how often each row was looked up. Labels and directions that are drawn depend on the content
of their batch, and on nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from factorformer import processes
from factorformer.fitting.batches import Calibration, as_batches
from factorformer.fitting.dependence import Sample, with_dependence
from factorformer.fitting.gradient_recorders import FisherRecorder, FisherRowsRecorder
from factorformer.fitting.metric import MetricName
from factorformer.fitting.moments import LayerStatistics
from factorformer.fitting.recorder import Recorder

UNSHOWN = "the model's output on the calibration data does not depend on it, left dense"
"""Of a layer that data reaches, and no gradient: why it is not made smaller."""


def collect(
    model: nn.Module,
    layers: Sequence[str],
    batches: Calibration,
    metric: MetricName,
    *,
    new_head: bool = False,
    token_counts: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, LayerStatistics]:
    """Run calibration batches through the model and measure what a metric needs of its layers.

    - `input_moment`: the second moment of every layer's input (DRONE, NeurIPS 2021; SVD-LLM, ICLR 2025).
    - `fisher_rows` (FWSVD, ICLR 2022): for each row the sum over its weights of the mean squared gradient of one
      example. The model's loss is taken to be a mean over the examples of a batch; where labels are of tokens, examples
      run one by one.
    - `fisher`: the second moments of inputs and of the gradients at outputs (Kronecker-factored Fisher information) of
      what `objective` differentiates, and from a few batches, run again, how far their product is from what it stands
      for.

    Args:
        model: left as it was, mode and gradients included.
        layers: names of linear layers with an input of `(..., width)`, and of embeddings.
        batches: keyword arguments of the model; for `fisher_rows` with labels, so that the model returns a loss.
        metric: what is to be minimized; for `plain` nothing is measured but which layers are reached.
        new_head: whether the model's head has learned nothing yet: `fisher` then looks at the hidden states below it.
        token_counts: how often each token occurs in more text than is run, `(vocabulary,)`; rows of the embeddings of
            tokens then count by these, scaled to the look-ups that were seen.
        progress: called with the number of batches done.

    Returns:
        Statistics by layer name, without the layers that no batch reached, or no loss where gradients are measured.

    Raises:
        DataError: no batches, none that reaches any of the layers, a missing loss, or values that are not finite.
    """
    recorder = _recorder(model, layers, metric, new_head)
    done, sample = 0, Sample()
    with recorder.attached():
        for batch in as_batches(model, batches):
            if metric == "fisher":
                sample.add(batch)
            if done % processes.count() == processes.place():
                recorder.run(batch)
            done += 1
            if progress is not None:
                progress(done)
    recorder.join()
    recorder.check(done)
    if token_counts is not None:
        recorder.count_tokens(token_counts)
    found = recorder.statistics()
    return with_dependence(model, found, sample.batches, new_head) if metric == "fisher" else found


def _recorder(model: nn.Module, layers: Sequence[str], metric: MetricName, new_head: bool) -> Recorder:
    if metric == "fisher":
        return FisherRecorder(model, layers, new_head=new_head)
    if metric == "fisher_rows":
        return FisherRowsRecorder(model, layers)
    return Recorder(model, layers, moments=metric == "input_moment")


def unreached(
    model: nn.Module,
    layers: Sequence[str],
    batches: Calibration,
    metric: MetricName = "plain",
    *,
    new_head: bool = False,
) -> dict[str, str]:
    """Those of the layers that calibration data does not reach, and what to say of them.

    Batches are run until all layers are reached.

    Args:
        model, layers, batches, new_head: as for `collect`.
        metric: under `fisher_rows` and `fisher` what is differentiated has to depend on them.

    Raises:
        DataError: no batches, or none that reaches any of the layers.
    """
    recorder = _recorder(model, layers, "plain" if metric == "input_moment" else metric, new_head)
    done = 0
    with recorder.attached():
        for batch in as_batches(model, batches):
            recorder.run(batch)
            done += 1
            if len(recorder.reached) == len(layers):
                break
    recorder.check(done)
    missing = [name for name in layers if name not in recorder.reached]
    shown = unreached_parts([name for name in missing if name not in recorder.seen], recorder.seen)
    return {name: shown.get(name, UNSHOWN) for name in missing}


def too_few_tokens(statistics: Mapping[str, LayerStatistics]) -> str | None:
    """A warning where fewer tokens were measured than the widest layer reads; None where there were enough."""
    measured = [known.inputs for known in statistics.values() if known.inputs is not None]
    widest = max((len(moment.total) for moment in measured), default=0)
    tokens = max((moment.count for moment in measured), default=0)
    if tokens >= widest:
        return None
    return (
        f"calibrated on {tokens:,} tokens, fewer than the {widest:,} values that a layer reads: fits follow these few, "
        "and losses that are predicted from them are too low; give more text"
    )


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
