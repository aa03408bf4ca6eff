"""Prepares the data of a config ahead of training: sentence pairs, vocabulary and token ids.

    python -m transformer.prepare --config=configs/NAME.py [--report] [--workers=N] [--config.SECTION.FIELD=VALUE …]

train.py with the same config then starts at once. Archives of WMT are taken from `data.manual_dir` or downloaded; run
the command again to resume. `--report` prints statistics of the data on stdout. JAX is not imported.
"""

import contextlib

from transformer import command_line
from transformer.config import schema
from transformer.data import input_pipeline, mixture_corpus, statistics, subword_dropout, tfds_builders, vocabulary
from transformer.data import tokenizer as tokenizers
from transformer.data.mixture_corpus import MixtureCorpus
from transformer.data.mixture_schedule import MixtureSchedule
from transformer.runtime import progress
from transformer.runtime.logging import log_info

# Expected shares of the time that preparing takes, for the time left.
STORE_SHARE, VOCABULARY_SHARE, ENCODE_SHARE = 20.0, 20.0, 50.0


def main(argv: list[str]) -> None:
    """Reads the flags, prepares, reports."""
    parser = command_line.config_parser("python -m transformer.prepare", __doc__)
    parser.add_argument("--report", action="store_true", help="print counts, lengths, duplicates and overlaps")
    parser.add_argument(
        "--workers", type=command_line.positive_int, default=0, help="processes that prepare (default: one a core)"
    )
    config, args = command_line.parse_with_config(parser, argv)
    prepare(schema.with_absolute_paths(config), report=args.report, workers=args.workers)


def prepare(config: schema.Config, *, report: bool, workers: int = 0) -> None:
    """Prepares what is missing and logs what is there.

    Args:
      config: of the run that the data is for.
      report: whether to print statistics.
      workers: processes that prepare; 0 for one a core.

    Raises:
      UserError: as `mixture_corpus.validate_sources` and `corpus.open_corpus`, or all training pairs are too long, or
        the vocabulary cannot be trained.
    """
    mixture_corpus.validate_sources(config.data)
    data = tokenizers.inherit_tokenizer(config)
    given = tokenizers.load_configured(data)
    subword_dropout.check_tokenizer(data, given)
    is_given = given is not None
    shares = {"pairs": STORE_SHARE + is_given * ENCODE_SHARE, "vocabulary": VOCABULARY_SHARE, "ids": ENCODE_SHARE}
    if is_given:  # the ids are made with the pairs
        del shares["vocabulary"], shares["ids"]
    stages = progress.Stages("preparing", {**shares, "batches": 1.0})
    with progress.shown(stages):
        with stages.stage("pairs"):
            corpus = mixture_corpus.open_sources(data, tokenize=True, workers=workers)
        with contextlib.nullcontext() if is_given else stages.stage("vocabulary"):
            tokenizer = vocabulary.get_or_train_tokenizer(data, corpus)
        with contextlib.nullcontext() if is_given else stages.stage("ids"):
            ids = {"train": input_pipeline.token_ids(data, corpus, "train", tokenizer, workers)}
        with stages.stage("batches"):
            ids["train"] = input_pipeline.with_subword_dropout(config, ids["train"], tokenizer)
            schedule = input_pipeline.make_batch_schedule(config, ids["train"])
            schedule.batch(0)  # orders the pairs of the first epoch
    log_info(
        f"ready in {tfds_builders.data_dir(data)}: {schedule.kept:,} training pairs, without {schedule.dropped:,} "
        f"longer than data.max_length = {data.max_length}; {tokenizer.vocab_size:,} subword tokens; "
        f"{schedule.steps_per_epoch:,} steps {schedule.period}"
    )
    for line in schedule.summary():
        log_info(line)
    if not report:
        return
    if isinstance(corpus, MixtureCorpus):
        assert isinstance(schedule, MixtureSchedule)
        statistics.print_mixture_report(config, corpus, schedule, tokenizer)
    else:
        splits = {name: corpus.split(name) for name in corpus.names}
        for name in splits:
            ids.setdefault(name, input_pipeline.token_ids(data, corpus, name, tokenizer, workers))
        statistics.print_report(config, splits, ids, schedule, corpus, tokenizer)


if __name__ == "__main__":
    command_line.run(main)
