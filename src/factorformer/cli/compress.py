"""`factorformer compress`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factorformer import processes
from factorformer.cli._given import note_unused
from factorformer.cli._options import (
    LARGEST,
    AsJson,
    Budget,
    CalibrationFile,
    Checkpointing,
    Device,
    DeviceChoice,
    Distill,
    Epochs,
    EvalFile,
    Exclude,
    FactorsOnly,
    FreezeEmbeddings,
    Include,
    Int4,
    Int8,
    LabelColumn,
    Method,
    Minutes,
    Model,
    Output,
    Overwrite,
    RankMultiple,
    Ratio,
    ReadLength,
    Resume,
    Scope,
    Seed,
    SequenceLength,
    Sequential,
    Share,
    Stream,
    Task,
    TextColumns,
    TrainFile,
    TrimVocabulary,
    UniqueLayers,
    data_option,
    emit,
    finite,
    kind_of,
    place_of,
    training_option,
)
from factorformer.cli._text_files import (
    PAIR,
    EvalSourceFile,
    EvalTargetFile,
    SourceFile,
    TargetFile,
    names_of,
    source_of,
)
from factorformer.errors import DataError, MethodError, OutputError

if TYPE_CHECKING:
    from factorformer.report import Result

LearningRate = Annotated[
    float | None,
    training_option(
        "--lr",
        min=0.0,
        callback=finite,
        help="Peak of the learning rate. By default 1e-4; for a model that learns without labels up to 5e-4, "
        "less for one that is near to the original already, wider than 384, or deeper than 6 layers.",
    ),
]
RowsToFit = Annotated[
    int | None,
    data_option(
        "--calibration-rows",
        min=1,
        max=LARGEST,
        help="How many of its rows are used. By default 512, and 2,048 for an encoder that learns from --distill "
        "alone; of windows of text as many as hold 131,072 tokens. More make better fits, and take longer.",
    ),
]
BatchSize = Annotated[
    int | None,
    training_option(
        "--batch-size",
        min=1,
        max=LARGEST,
        help="Rows in a step: texts or pairs. By default 32, and 128 for an encoder that learns from --distill alone; "
        "of windows of text as many as hold 4,096 tokens.",
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        rich_help_panel="What becomes of the weights",
        help="Carry out a plan that `factorformer plan --output` wrote, instead of making one.",
    ),
]


ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Tell in an HTML file what became of the model, as `factorformer report` does, the original beside it.",
    ),
]


def compress(
    model: Model,
    output: Output,
    method: Method = None,
    ratio: Ratio = None,
    budget: Budget = None,
    int8: Int8 = False,
    int4: Int4 = False,
    scope: Scope = None,
    include: Include = None,
    exclude: Exclude = None,
    share: Share = None,
    rank_multiple: RankMultiple = None,
    unique_layers: UniqueLayers = None,
    trim_vocabulary: TrimVocabulary = None,
    plan: PlanFile = None,
    calibration: CalibrationFile = None,
    calibration_rows: RowsToFit = None,
    train: TrainFile = None,
    evaluation: EvalFile = None,
    text: TextColumns = None,
    label: LabelColumn = None,
    task: Task = None,
    source: SourceFile = None,
    target: TargetFile = None,
    eval_source: EvalSourceFile = None,
    eval_target: EvalTargetFile = None,
    max_length: ReadLength = None,
    sequence_length: SequenceLength = None,
    epochs: Epochs = 3.0,
    minutes: Minutes = None,
    lr: LearningRate = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    distill: Distill = None,
    freeze_embeddings: FreezeEmbeddings = True,
    factors_only: FactorsOnly = False,
    gradient_checkpointing: Checkpointing = False,
    stream: Stream = None,
    sequential: Sequential = False,
    device: Device = DeviceChoice.auto,
    resume: Resume = False,
    overwrite: Overwrite = False,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Replace the weight matrices of a model by smaller factors, train them if there is data, and save the result.

    [bold]Without --train[/bold] this is post-training compression: it takes seconds to minutes, and everything beside
    the weights (tokenizer, pooling of a sentence encoder) is copied as it is. Give it some text with --calibration.

    [bold]With --train and --label[/bold] the compressed model is fine-tuned on a task. MODEL may be fine-tuned already,
    which is better; otherwise it gets a new head. An encoder-decoder learns from --source and --target as well.

    [bold]With --train and --distill but no --label[/bold] the compressed model learns on plain text to embed as the
    teacher does, to score as its head does, or to predict next tokens as it does, for --epochs, or for the --minutes
    that there are. A causal language model needs no teacher: it learns the tokens of the text then. Ten times on the
    way held-out texts are compared, and a checkpoint is written; after an interruption the same command goes on with
    --resume.

    [bold]Without --label[/bold] --eval is plain text, by default a part of the training file. 'embedding cosine' is the
    mean cosine between the embeddings of the original and the compressed model, and 'similarity spearman' the rank
    correlation of the similarities that the two see between texts.

    [bold]A causal language model[/bold] reads plain text as windows of --sequence-length tokens: a text file is one
    document, and so is each row of other data, or each conversation of a column of messages. It is measured by its
    perplexity, 'next token divergence' and 'next token agreement': how far its predictions are from the original's.

    The output is an ordinary Hugging Face model directory in the precision of the model, saved before it is measured;
    the result lies in it as factorformer.json. 'ratio' is the bytes of the original tensors in scope over the bytes of
    what replaces them, at equal precision.

    \b
    [bold]Examples[/bold]
      factorformer compress minilm small/ --ratio 2 --calibration texts.txt
      factorformer compress minilm small/ --train texts.txt --distill minilm \\
          --int4 --scope all --ratio 10 --minutes 30
      factorformer compress minilm small/ --int8 --ratio 8 --calibration texts.txt
      factorformer compress dense/ small/ --ratio 2.8 --train train.tsv \\
          --eval dev.tsv --label label --distill dense/
      factorformer compress chat/ small-chat/ --ratio 1.5 --train wiki.txt --distill chat/ \\
          --minutes 60
    """
    from factorformer.files import check_file, check_output

    learned = source_of("--train", train, source, target)
    judged = source_of("--eval", evaluation, eval_source, eval_target, "eval-")
    files = (calibration, trim_vocabulary, *names_of(learned, judged))
    check_output(output, overwrite=overwrite, inputs=(model, plan, distill, *files))
    if report is not None:
        if report.resolve() == output.resolve() or output.resolve() in report.resolve().parents:
            raise OutputError(f"--report '{report}' is, or lies in, the directory to make: name a file beside it")
        if stream:
            raise MethodError("--report reads the whole model, which --stream never holds: leave one of them out")
        check_file(report, overwrite=overwrite, inputs=(model, plan, distill, *files))
        from factorformer.report.page import check_packages

        check_packages()
    if label is None and train is not None and eval_source is not None:
        raise DataError("--train is plain text without --label, and --eval-source is measured on by its translations")
    if train is None and evaluation is None and (source is not None or eval_source is not None):
        note_unused("beside --source and --target", "label", *(() if calibration is not None else ("text",)))
        label = PAIR[1]
    if learned is None:
        read = ("epochs", "minutes", "lr", "freeze_embeddings", "factors_only", "gradient_checkpointing")
        note_unused("without --train", *read)
    elif minutes is not None:
        note_unused("beside --minutes", "epochs")
    if learned is not None and label is not None:
        note_unused("with labels", "factors_only", "gradient_checkpointing")
    if learned is None and judged is None and calibration is None:
        read = () if trim_vocabulary is not None else ("text",)
        note_unused(
            "without data", *read, "task", "max_length", "sequence_length", "batch_size", "calibration_rows", "seed"
        )
    if not stream:
        note_unused("without --stream", "sequential")
    from factorformer.cli._jobs.compress import CompressJob, run
    from factorformer.cli._jobs.unfinished import is_unfinished
    from factorformer.cli._texts import columns_of
    from factorformer.planning import Plan
    from factorformer.tasks.finetuning import TrainingSettings
    from factorformer.tasks.healing import HealingSettings

    training = TrainingSettings(epochs, seed=seed, freeze_embeddings=freeze_embeddings)
    healing = HealingSettings(
        epochs,
        seed=seed,
        freeze_embeddings=freeze_embeddings,
        minutes=minutes,
        factors_only=factors_only,
        checkpointing=gradient_checkpointing,
    )
    chosen = {"learning_rate": lr, "batch_size": batch_size}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    job = CompressJob(
        model=model,
        output=str(output),
        method=method,
        ratio=ratio,
        budget=None if budget is None else budget.value,
        int8=int8,
        int4=int4,
        scope=None if scope is None else scope.value,
        include=include,
        exclude=exclude,
        share=None if share is None else share.value,
        rank_multiple=rank_multiple,
        unique_layers=unique_layers,
        trim_vocabulary=trim_vocabulary,
        plan=None if plan is None else Plan.load(plan),
        columns=columns_of(text, label, task),
        task=kind_of(task, learned, judged),
        train=learned,
        evaluation=judged,
        calibration=calibration,
        calibration_rows=calibration_rows,
        max_length=max_length,
        sequence_length=sequence_length,
        batch_size=batch_size,
        settings=dataclasses.replace(training, **chosen),
        healing=dataclasses.replace(healing, **chosen),
        distill=distill,
        stream=stream,
        sequential=sequential,
        device=place_of(device),
        overwrite=overwrite,
    )
    try:
        result = run(job, resume=resume)
        emit(result, as_json=as_json)
        if report is not None and processes.is_first():
            _tell(result, model, report, overwrite=overwrite)
    except KeyboardInterrupt as error:
        if not is_unfinished(output):
            raise
        raise typer.Exit(130) from error  # what is kept was said already


def _tell(result: Result, original: str, file: Path, *, overwrite: bool) -> None:
    """The report of what was made, whose directory is complete."""
    from factorformer.cli._inputs import saved
    from factorformer.cli._options import note
    from factorformer.cli.report import report

    assert result.output is not None
    if result.streamed:
        note(f"no report: it reads the whole model, which memory does not hold (factorformer report {result.output})")
        return
    with saved(result.output, "compressed", "has no report"):
        report(result.output, original, file, overwrite=overwrite)
