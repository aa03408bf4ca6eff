"""Data sets of evaluation: a split of the config's data, text files, or a public test set."""

from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from transformer.config import DataConfig
from transformer.config.mixture import Direction
from transformer.data import corpus, text_files
from transformer.evaluation import public_test_sets
from transformer.evaluation.metrics import check_lengths
from transformer.runtime.errors import UserError
from transformer.runtime.files import json_digest


class EvalDataset(NamedTuple):
    """Sources and their references.

    Attributes:
      name: of the split, of the file of sources, or of the test set with _ for /.
      references: one or several lists, each as long as the sources.
    """

    name: str
    sources: list[str]
    references: list[list[str]]

    @property
    def digest(self) -> str:
        """Changes with any sentence."""
        return json_digest([self.sources, self.references])[:16]


def load_eval_dataset(
    data: DataConfig,
    split: str | None,
    source: str | None,
    references: Sequence[str] | None,
    test_set: str | None = None,
    direction: Direction | None = None,
) -> EvalDataset:
    """Reads a split of the config's data, text files, or a public test set.

    Args:
      data: the config's.
      split: its name, as `Corpus.split` takes it; None is "test".
      source: a file of sentences, instead of a split.
      references: the files of its references.
      test_set: sacreBLEU's name of a test set, instead of a split.
      direction: of a mixture, whose name becomes part of that of the data set.

    Raises:
      UserError: a split, file or test set is missing, or the numbers of lines differ.
    """
    if direction is not None and data.mixture:
        dataset = load_eval_dataset(direction.data, split, source, references, test_set)
        return dataset._replace(name=f"{dataset.name}.{direction.name}")
    if test_set:
        sources, lists = public_test_sets.load(test_set, (data.source_language, data.target_language))
        return EvalDataset(test_set.replace("/", "_"), sources, lists)
    if source and references:
        lines = [list(text_files.read_lines(path)) for path in references]
        dataset = EvalDataset(epath.Path(source).name, list(text_files.read_lines(source)), lines)
        check_lengths(len(dataset.sources), dataset.references)
        return dataset
    try:
        data_split = corpus.open_corpus(data).split(split or "test")
    except UserError as error:
        raise UserError(f"{error}. Or name another --split, or score files with --source and --reference") from error
    return EvalDataset(data_split.name, data_split.sources(), [data_split.targets()])
