"""`factorformer finetune`."""

from __future__ import annotations

from factorformer.cli._given import note_unused
from factorformer.cli._options import (
    LENGTH,
    AsJson,
    BatchSize,
    Device,
    DeviceChoice,
    Distill,
    Epochs,
    EvalFile,
    FreezeEmbeddings,
    LabelColumn,
    LearningRate,
    MaxLength,
    Model,
    Output,
    Overwrite,
    Seed,
    Task,
    TextColumns,
    TrainFile,
    emit,
    kind_of,
    place_of,
)
from factorformer.cli._text_files import EvalSourceFile, EvalTargetFile, SourceFile, TargetFile, names_of, source_of
from factorformer.errors import DataError


def finetune(
    model: Model,
    output: Output,
    train: TrainFile = None,
    label: LabelColumn = None,
    evaluation: EvalFile = None,
    text: TextColumns = None,
    source: SourceFile = None,
    target: TargetFile = None,
    eval_source: EvalSourceFile = None,
    eval_target: EvalTargetFile = None,
    task: Task = None,
    max_length: MaxLength = LENGTH,
    epochs: Epochs = 3.0,
    lr: LearningRate = 1e-4,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    distill: Distill = None,
    freeze_embeddings: FreezeEmbeddings = True,
    device: Device = DeviceChoice.auto,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a model on labelled text: the dense baseline, and the teacher for `compress --distill`.

    The model gets a head for the labels that the training file holds, or keeps its own if that knows them all.
    MODEL may be compressed: then its factors are trained, and stay in integers if they are. The output is an ordinary
    Hugging Face model directory with the tokenizer, and the result as factorformer.json.

    Labels decide the task, unless --task does: names or whole numbers are classes of a text, fractions a regression,
    lists any number of classes of a text. Objects with lists 'text' and 'answer_start', as in SQuAD, are answers to a
    question from its context, and an encoder-decoder that writes, such as T5, learns to write the label for the text,
    or the lines of --target for those of --source. A model that has a head for another task is refused. The column of
    labels is 'label' unless --label names another.

    Metrics are accuracy, macro-F1, Matthews correlation (and the F1 of the second of two classes); for a regression
    Pearson and Spearman correlation and mean squared error; for several classes a text micro- and macro-F1 and the
    accuracy of whole sets; for words accuracy and macro-F1; for answers exact match and F1 of words; for texts BLEU,
    chrF and perplexity. The model is saved before it is measured, in the precision that it came in.

    \b
    [bold]Examples[/bold]
      factorformer finetune minilm dense/ --train train.tsv --eval dev.tsv
      factorformer finetune minilm pairs/ --train mrpc.jsonl \\
          --text sentence1 --text sentence2 --label same
      factorformer finetune bert/ answers/ --train squad.jsonl \\
          --text question --text context --label answers --max-length 384
      factorformer finetune bert/ tagger/ --train tags.jsonl \\
          --text words --label tags --task token-classification
      factorformer finetune t5/ translator/ --source train.de --target train.en
    """
    from factorformer.files import check_output

    learned = source_of("--train", train, source, target)
    judged = source_of("--eval", evaluation, eval_source, eval_target, "eval-")
    check_output(output, overwrite=overwrite, inputs=(model, distill, *names_of(learned, judged)))
    if learned is None:
        raise DataError("there is nothing to learn: give --train, or --source and --target")
    if train is None and evaluation is None:
        note_unused("beside --source and --target", "text", "label")
    from factorformer.cli._jobs.finetune import run
    from factorformer.cli._texts import columns_of
    from factorformer.tasks.finetuning import TrainingSettings

    result = run(
        model,
        str(output),
        learned,
        judged,
        columns_of(text, label or "label", task),
        TrainingSettings(epochs, lr, batch_size, seed, freeze_embeddings=freeze_embeddings),
        task=kind_of(task, learned, judged),
        max_length=max_length,
        distill=distill,
        device=place_of(device),
        overwrite=overwrite,
    )
    emit(result, as_json=as_json)
