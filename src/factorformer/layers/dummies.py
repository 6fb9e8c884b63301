"""Random inputs made from a model's configuration, for trials that need any forward pass at all."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from factorformer.layers.modes import evaluating, quiet

Inputs = dict[str, Tensor]

SOUND = 4000
"""Samples of a waveform: enough for the strides of the convolutions that speech encoders begin with."""


def dummy_inputs(model: nn.Module, rows: int = 2, length: int = 8) -> Iterator[Inputs]:
    """Batches that the forward pass may accept, the plainest first: its main input alone, then all that it takes.

    Nobody checks that a model accepts them: try one after the other; the last ones have a single row, for heads that
    cannot tell padding. The generator of random numbers is untouched.

    Args:
        model: of transformers; none are known for other modules.
        rows: size of the batch.
        length: of texts, in tokens.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, transformers.PreTrainedModel) or config is None:
        return
    for count in dict.fromkeys((rows, 1)):
        yield from _batches(model, config, count, length)


def accepted(model: nn.Module) -> Inputs | None:
    """A random batch that a model runs on; None where none is found, or weights have no values."""
    if any(tensor.is_meta for tensor in model.parameters()):
        return None
    like = next(model.parameters(), torch.empty(0))
    for batch in dummy_inputs(model):
        batch = {k: v.to(like if v.is_floating_point() else like.device) for k, v in batch.items()}
        with quiet(), evaluating(model), contextlib.suppress(Exception):  # an input of another kind than it takes
            model(**batch)
            return batch
    return None


def _batches(model: transformers.PreTrainedModel, config: Any, rows: int, length: int) -> Iterator[Inputs]:
    taken = inspect.signature(model.forward).parameters
    random = torch.Generator().manual_seed(0)
    ids = _tokens(config, rows, length, random)
    texts = ids[:, None].repeat(1, 2, 1) if "MultipleChoice" in type(model).__name__ else ids
    kinds: dict[str, list[Inputs]] = {
        "input_ids": [{"input_ids": texts}],
        "pixel_values": [{"pixel_values": pixels} for pixels in _images(config, rows, random)],
        "input_features": [{"input_features": features} for features in _spectra(config, rows, random)],
        "input_values": [{"input_values": values} for values in _sounds(config, rows, random)],
    }
    able = {name: [made for made in batches if set(made) <= set(taken)] for name, batches in kinds.items()}
    able = {name: batches for name, batches in able.items() if batches}
    main = model.main_input_name
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in taken else {}
    seen: list[set[tuple[str, tuple[int, ...]]]] = []
    for names in ([main], ["input_ids"], ["input_ids", main], list(able)):
        for parts in itertools.product(*(able.get(name, []) for name in dict.fromkeys(names))):
            for extra in (decoder, {}):
                batch = {key: value for part in (*parts, extra) for key, value in part.items()}
                shape = {(key, tuple(value.shape)) for key, value in batch.items()}
                if batch and shape not in seen:
                    seen.append(shape)
                    yield batch


def configurations(config: Any) -> Iterator[Any]:
    """A configuration and those inside of it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            yield from configurations(inner)


def setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these settings that a configuration or one inside of it has."""
    for each in configurations(config):
        for name in names:
            value = getattr(each, name, None)
            if value is not None:
                return value
    return default


def _tokens(config: Any, rows: int, length: int, random: torch.Generator) -> Tensor:
    """Words that stand for nothing else, such as an image, and an end of the text."""
    size = int(setting(config.get_text_config(), "vocab_size", default=0) or setting(config, "vocab_size", default=100))
    special = {
        value
        for each in configurations(config)
        for name, value in vars(each).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    words = torch.tensor([word for word in range(min(size, 1000)) if word not in special] or [0])
    ids = words[torch.randint(len(words), (rows, length), generator=random)]
    end = setting(config.get_text_config(), "eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if isinstance(end, int) and 0 <= end < size:
        ids[:, -1] = end
    return ids


def _images(config: Any, rows: int, random: torch.Generator) -> Iterator[Tensor]:
    size = setting(config, "image_size", "input_size", default=64)
    if isinstance(size, dict):
        size = (size.get("height", 64), size.get("width", 64))
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = int(setting(config, "num_channels", "in_channels", "in_chans", "image_channels", default=3))
    frames = int(setting(config, "num_frames", "frames_per_clip", default=2))
    for shape in ((rows, channels, height, width), (rows, frames, channels, height, width)):
        yield torch.randn(shape, generator=random)


def _sounds(config: Any, rows: int, random: torch.Generator) -> Iterator[Tensor]:
    times, bands = setting(config, "max_length"), setting(config, "num_mel_bins")
    if isinstance(times, int) and isinstance(bands, int):  # spectrograms under the name of waveforms
        yield torch.randn(rows, times, bands, generator=random)
    yield torch.randn(rows, SOUND, generator=random)


def _spectra(config: Any, rows: int, random: torch.Generator) -> Iterator[Tensor]:
    bands = setting(
        config, "num_mel_bins", "input_feat_per_channel", "feature_size", "feature_projection_input_dim", default=80
    )
    times = 2 * int(setting(config, "max_source_positions", default=32))
    for shape in ((rows, bands, times), (rows, times, bands)):
        yield torch.randn(shape, generator=random)
