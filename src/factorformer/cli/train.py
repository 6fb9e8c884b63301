"""`factorformer train`."""

from __future__ import annotations

from enum import Enum
from functools import partial
from typing import Annotated

import typer

from factorformer.cli._options import (
    LARGEST,
    LENGTH,
    AsJson,
    BatchSize,
    Device,
    DeviceChoice,
    Epochs,
    EvalFile,
    Exclude,
    Include,
    MaxLength,
    Output,
    Overwrite,
    Ratio,
    Resume,
    ScopeChoice,
    Seed,
    TextColumns,
    TrainFile,
    emit,
    finite,
    place_of,
    training_option,
    weights_option,
)
from factorformer.cli._text_files import EvalSourceFile, EvalTargetFile, SourceFile, TargetFile, TextFiles
from factorformer.errors import MethodError
from factorformer.files import check_output


class PrecisionChoice(str, Enum):
    """Precision of products in training."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


model_option = partial(typer.Option, rich_help_panel="The model")
ConfigName = Annotated[
    str | None,
    model_option(
        "--config",
        metavar="NAME",
        help="An architecture of transformers, such as marian, t5, gpt2, llama or bert, which is made small; or a "
        "config.json, a model directory, or a model on the Hub, whose sizes are taken over. By default marian for "
        "translations and gpt2 for text.",
    ),
]
Set = Annotated[
    list[str] | None,
    model_option(
        "--set",
        metavar="FIELD=VALUE",
        help="A field of the configuration, e.g. d_model=512. Can be given several times.",
    ),
]
Vocabulary = Annotated[
    int, model_option("--vocabulary", min=1, max=2**20, help="Tokens of the tokenizer that is trained.")
]

Method = Annotated[
    str,
    weights_option(
        "--method",
        metavar="NAME",
        help="'shapeshifter', another of `factorformer methods` that needs no data (svd: low-rank factors), or 'dense' "
        "for the model without factors, to compare with.",
    ),
]
Scope = Annotated[
    ScopeChoice,
    weights_option(
        "--scope", help="What the ratio is about: the whole model with its embeddings, or the Transformer blocks alone."
    ),
]

Steps = Annotated[
    int | None, training_option("--steps", min=1, max=LARGEST, help="Train for so many steps, whatever --epochs says.")
]
LearningRate = Annotated[
    float | None,
    training_option(
        "--lr",
        min=1e-9,
        callback=finite,
        help="Peak of the learning rate. By default 2e-3, and 1e-3 for the dense model.",
    ),
]
Precision = Annotated[
    PrecisionChoice,
    training_option("--precision", help="Of the computation; weights are trained and saved in fp32. fp16 needs a GPU."),
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read the data, train the tokenizer, show the plan, and write nothing.")
]


def train(
    output: Output,
    source: SourceFile = None,
    target: TargetFile = None,
    eval_source: EvalSourceFile = None,
    eval_target: EvalTargetFile = None,
    text_file: TrainFile = None,
    eval_file: EvalFile = None,
    text: TextColumns = None,
    max_length: MaxLength = LENGTH,
    config: ConfigName = None,
    overrides: Set = None,
    vocabulary: Vocabulary = 8000,
    method: Method = "shapeshifter",
    ratio: Ratio = None,
    scope: Scope = ScopeChoice.all,
    include: Include = None,
    exclude: Exclude = None,
    epochs: Epochs = 20.0,
    steps: Steps = None,
    batch_size: BatchSize = 128,
    lr: LearningRate = None,
    seed: Seed = 0,
    device: Device = DeviceChoice.auto,
    precision: Precision = PrecisionChoice.fp32,
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from scratch on your own text, with factors in the place of weight matrices from the first step on.

    A tokenizer is trained on the text, then the model that --config names: an encoder-decoder learns to translate
    (--source and --target), a decoder to continue text, an encoder to fill in hidden words (--train, in blocks of
    --max-length tokens). By default it is a Shapeshifter: every matrix is a sum of few Kronecker
    products, and the whole model, embeddings included, takes a tenth of its bytes.

    The output is an ordinary Hugging Face model directory with its tokenizer, the result as factorformer.json, and the
    learning curve as training.json. 'bleu' and 'chrf' are those of sacreBLEU, by beam search; 'perplexity' is that of
    a token of this tokenizer. All are measured on held-out text: --eval, --eval-source and --eval-target, or else at
    most a tenth of the training text, drawn at random.

    A checkpoint is written twenty times on the way. After an interruption the same command goes on with --resume. No
    failure deletes checkpoints; they lie beside the output until it is complete.

    \b
    [bold]Examples[/bold]
      factorformer train de-en/ --source train.de --target train.en
      factorformer train writer/ --train book.txt --config llama --set num_hidden_layers=6
      factorformer train reader/ --train texts.txt --config bert --method svd --ratio 5
      factorformer train de-en/ --source train.de --target train.en --dry-run
    """
    if resume and dry_run:
        raise MethodError("--dry-run trains nothing: leave --resume out")
    files = TextFiles(source, target, eval_source, eval_target, text_file, eval_file, text)
    if not dry_run:
        check_output(output, overwrite=overwrite, inputs=(config, *files.names))
    _check_method(method, ratio, include, exclude)
    from factorformer.cli._jobs.train import DENSE, TrainJob, preview, run
    from factorformer.cli._jobs.unfinished import is_unfinished
    from factorformer.tasks.from_scratch import ScratchSettings

    place = place_of(device)
    if precision == PrecisionChoice.fp16 and place == "cpu":
        raise MethodError("--precision fp16 needs a GPU: choose bf16 or fp32")
    settings = ScratchSettings(
        epochs=epochs,
        steps=steps,
        learning_rate=lr or (1e-3 if method == DENSE else 2e-3),
        batch_size=batch_size,
        label_smoothing=0.1 if files.pairs else 0.0,
        precision=precision.value,
        seed=seed,
        use_cpu=place == "cpu",
    )
    job = TrainJob(
        output=output,
        files=files,
        max_length=max_length,
        config=config or ("marian" if files.pairs else "gpt2"),
        overrides=overrides or [],
        vocabulary=vocabulary,
        method=method,
        ratio=10.0 if ratio is None else ratio,
        scope=scope.value,
        include=include,
        exclude=exclude,
        settings=settings,
    )
    if dry_run:
        emit(preview(job), as_json=as_json)
        return
    try:
        emit(run(job, resume=resume, overwrite=overwrite), as_json=as_json)
    except KeyboardInterrupt as error:
        if not is_unfinished(output):
            raise
        raise typer.Exit(130) from error  # what is kept was said already


def _check_method(method: str, ratio: float | None, include: list[str] | None, exclude: list[str] | None) -> None:
    """`MethodError` for a method that begins with trained weights, or options that the dense model has no use for."""
    from factorformer import compression, recipes
    from factorformer.cli._jobs.train import DENSE

    usable = [n for n, recipe in recipes.RECIPES.items() if recipe.metric == "plain" and recipe.allocation != "dynamic"]
    if method not in (*usable, DENSE):
        recipes.get(method)  # which knows better what to say of a name that does not exist
        raise MethodError(
            f"method '{method}' begins with a trained model's weights, and a new model has none: "
            f"choose one of {', '.join([*usable, DENSE])}"
        )
    if method != DENSE:
        compression.check_options(method, ratio, None, "bytes")
    if method == DENSE and (ratio is not None or include is not None or exclude is not None):
        raise MethodError("--method dense changes no weights: leave --ratio, --include and --exclude out")
