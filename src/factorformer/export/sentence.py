"""Sentence encoders in the layout of sentence-transformers: what follows the Transformer, as tensors to tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from factorformer.errors import CheckpointError, ExportError, one_of
from factorformer.hf import layout
from factorformer.hf.source import find
from factorformer.training.distillation import mean_pool

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

ENDLESS = 10**6
"""Tokens from which on a tokenizer says that it cuts nothing."""

ACTIVATIONS = "torch.nn.modules."
"""Where the activation of a `Dense` module has to come from."""

_OLD_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a sentence encoder makes one vector of those of its tokens.

    Args:
        modes: the first token, the largest entries, the mean, the sum over the root of the number of tokens, the mean
            weighted by position, or the last token; several are concatenated.
        normalize: divide by the Euclidean norm.
        after: what is applied to the vector then, in order.

    Raises:
        ExportError: an unknown mode, or none.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    after: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise ExportError(f"pooling mode {one_of(mode, MODES)}")
        if not self.modes:
            raise ExportError(f"pooling needs at least one mode; allowed: {', '.join(MODES)}")

    def __call__(
        self, hidden: Float[Tensor, "batch length width"], mask: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch pooled"]:
        """One vector for each text, before `after`; padding, where the mask is 0 on either side, does not count."""
        weights = mask[:, :, None].to(hidden.dtype)
        places = torch.arange(1, hidden.shape[1] + 1, device=mask.device)
        first = mask.to(torch.int32).argmax(1)
        vectors = []
        for mode in self.modes:
            if mode in ("cls", "lasttoken"):
                # ONNX Runtime has no ArgMax of int64.
                place = first if mode == "cls" else (mask * places).to(torch.int32).argmax(1)
                vectors.append(hidden.gather(1, place[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0])
            elif mode == "max":
                vectors.append(hidden.masked_fill(weights == 0, float("-inf")).amax(1))
            else:
                counted = weights
                if mode == "weightedmean":
                    counted = weights * (places - first[:, None])[:, :, None].to(hidden.dtype)
                count = counted.sum(1).clamp(min=1e-9)
                divisor = count.sqrt() if mode == "mean_sqrt_len_tokens" else count
                vectors.append((hidden * counted).sum(1) / divisor)
        pooled = torch.cat(vectors, dim=1) if len(vectors) > 1 else vectors[0]
        return F.normalize(pooled, dim=1) if self.normalize else pooled

    def check_width(self, hidden: int) -> None:
        """Raise `ExportError` if a `Dense` module does not take the vectors that it would be given."""
        width = hidden * len(self.modes)
        for module in self.after:
            if isinstance(module, Projection):
                if module.linear.in_features != width:
                    raise ExportError(
                        f"a Dense module takes vectors of {module.linear.in_features}, and is given {width}"
                    )
                width = module.linear.out_features


class Normalize(nn.Module):
    """Divides vectors by their Euclidean norm."""

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """At length 1."""
        return F.normalize(x, dim=1)


class Projection(nn.Module):
    """The `Dense` module of sentence-transformers: `f(x W^T + b)`, plus `x` or a product of it where it is residual."""

    def __init__(
        self, sizes: tuple[int, int], *, bias: bool = True, activation: nn.Module, residual: bool = False
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(*sizes, bias=bias)
        self.activation = activation
        self.residual: nn.Module | None = None
        if residual:
            self.residual = nn.Identity() if sizes[0] == sizes[1] else nn.Linear(*sizes, bias=False)

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch out"]:
        """The projected vectors."""
        y = self.activation(self.linear(x))
        return y if self.residual is None else y + self.residual(x)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parts of a model are.

    Args:
        source: its directory.
        transformer: the directory of the Transformer: the same, or a folder in it.
        pooling: what is made of the hidden states; None if the directory is not of sentence-transformers.
    """

    source: Path
    transformer: Path
    pooling: Pooling | None = None

    @property
    def pooler(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What to learn, and to fit: `pool`, and just `mean_pool` where that is the same up to the norm."""
        means = self.pooling is None or self.pooling.modes == ("mean",)
        after = () if self.pooling is None else self.pooling.after
        return mean_pool if means and all(isinstance(module, Normalize) for module in after) else self.pool

    def pool(
        self, hidden: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch pooled"]:
        """What users get: as the directory says, and where it says nothing the mean over real tokens."""
        hidden = hidden.float()
        if self.pooling is None:
            return mean_pool(hidden, mask)
        vectors = self.pooling(hidden, mask.long())
        for module in self.pooling.after:
            with torch.inference_mode(mode=False):  # what is moved may be learned through later
                module.to(vectors.device)
            vectors = module(vectors)
        return vectors


def find_layout(model: str) -> Layout:
    """The parts of a model in a directory, or of a name on the Hub or `minilm`.

    Raises:
        ModelError: no such model.
        CheckpointError, ExportError: as from `read_layout`.
    """
    return read_layout(find(model))


def read_layout(directory: Path, *, alone: bool = True) -> Layout:
    """What `modules.json` describes, if there is one.

    Args:
        directory: of the model.
        alone: whether it is to run as a file, which sees tokens and no prompts.

    Raises:
        CheckpointError: a description or weights that cannot be read.
        ExportError: modules, modes or activations that the export does not know, or a default prompt that is not to be
            pooled.
    """
    file = directory / "modules.json"
    if not file.is_file():
        return Layout(directory, directory)
    modules = [(kind, directory / folder) for kind, folder in layout.modules(directory)]
    names = [name for name, _ in modules]
    if names == ["Transformer"]:  # a cross-encoder, whose head is in the Transformer
        return Layout(directory, modules[0][1])
    if names[:2] != ["Transformer", "Pooling"] or not {"Dense", "Dropout", "Normalize"}.issuperset(names[2:]):
        raise ExportError(
            f"'{file}' lists {', '.join(names)}; what can be exported is Transformer, Pooling, and then any of "
            "Dense, Dropout and Normalize"
        )
    active = [(name, folder) for name, folder in modules[2:] if name != "Dropout"]  # which acts in training alone
    after = tuple(Normalize() if name == "Normalize" else _projection(folder) for name, folder in active)
    sees = not alone and not read_writing(directory).prompt
    pooling = dataclasses.replace(_pooling(modules[1][1] / "config.json", prompts=sees), after=after)
    return Layout(directory, modules[0][1], pooling)


def _pooling(file: Path, *, prompts: bool) -> Pooling:
    config = layout.read_json(file)
    if config.get("include_prompt") is False and not prompts:
        raise ExportError(f"'{file}' leaves prompts out of the pooling, of which tokens alone do not tell")
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for key, name in _OLD_NAMES.items() if config.get(key)]
    return Pooling((mode,) if isinstance(mode, str) else tuple(mode))


def _projection(folder: Path) -> Projection:
    file = folder / "config.json"
    config = layout.read_json(file)
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ExportError(
                f"'{file}' is about '{config[key]}'; only a Dense of 'sentence_embedding' can be exported"
            )
    path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    kind = getattr(nn, path.rpartition(".")[2], None) if path.startswith(ACTIVATIONS) else None
    if kind is None:
        raise ExportError(f"'{file}' has the activation {path}; only modules of torch.nn can be exported")
    try:
        sizes = int(config["in_features"]), int(config["out_features"])
        projection = Projection(
            sizes,
            bias=bool(config.get("bias", True)),
            activation=kind(),
            residual=bool(config.get("use_residual", False)),
        )
        weights = folder / "model.safetensors"
        old = folder / "pytorch_model.bin"
        tensors = load_file(weights) if weights.is_file() else torch.load(old, map_location="cpu", weights_only=True)
        projection.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the Dense module '{folder}': {error}") from error
    return projection.requires_grad_(False)


@dataclasses.dataclass(frozen=True)
class Writing:
    """What sentence-transformers makes of a text before the tokenizer reads it.

    Args:
        prompt: that every text begins with.
        lower: whether texts are put into lower case.
        prompts: all that the directory names, for one kind of text or another.
    """

    prompt: str = ""
    lower: bool = False
    prompts: tuple[str, ...] = ()

    def __call__(self, text: str) -> str:
        """The text as it is read."""
        return self.cased(f"{self.prompt}{text}")

    def cased(self, text: str) -> str:
        """A part of a text in its case."""
        return text.lower() if self.lower else text


def read_writing(directory: Path) -> Writing:
    """What a directory says of texts; nothing, if it is not of sentence-transformers."""
    if not (directory / layout.MODULES).is_file():
        return Writing()
    file = directory / "config_sentence_transformers.json"
    said = layout.read_json(file) if file.is_file() else {}
    prompts = {name: str(prompt) for name, prompt in (said.get("prompts") or {}).items() if prompt}
    chosen = prompts.get(said.get("default_prompt_name") or "", "")
    _, transformer = next(iter(layout.modules(directory)), ("", ""))
    settings = [layout.read_json(file) for file in (directory / transformer).glob("sentence_*_config.json")]
    return Writing(chosen, any(bool(each.get("do_lower_case")) for each in settings), tuple(prompts.values()))


def read_longest(directory: Path) -> int | None:
    """Tokens after which sentence-transformers cuts the texts of an encoder, if its directory says so.

    That is a setting of old, called after one of several architectures, or the tokenizer's, within what the model has
    positions for.
    """
    for file in sorted(directory.glob("sentence_*_config.json")):
        if longest := layout.read_json(file).get("max_seq_length"):
            return longest
    described = [directory / name for name in ("tokenizer_config.json", "config.json")]
    read, positions = (layout.read_json(file) if file.is_file() else {} for file in described)
    known = [read.get("model_max_length"), positions.get("max_position_embeddings")]
    return min((int(value) for value in known if isinstance(value, (int, float)) and value < ENDLESS), default=None)
