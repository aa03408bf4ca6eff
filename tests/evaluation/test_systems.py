"""Systems to compare with: another model, its translations in a workdir, or a file of any program."""

import pytest

from tests.checkpoints.test_manager import make_parts, save
from tests.evaluation.test_scoring import DATASET, make_trained, write
from transformer.evaluation import evaluator, results, systems
from transformer.runtime.errors import UserError


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/a", "runs/b/"], ["a", "b"]),
        (["x/demo", "y/demo"], ["x", "y"]),
        (["/r/a/translations/8.test.txt", "/r/b/translations/8.test.txt"], ["a", "b"]),
        (["x/demo", "y/demo", "z/best"], ["x/demo", "y/demo", "best"]),
        (["gs://b/r/demo", "demo"], ["r/demo", "demo"]),
        (["a", "a", "b"], ["a (1)", "a (2)", "b"]),
    ],
)
def test_labels_are_as_short_as_they_differ(paths, labels):
    assert systems.labels(paths) == labels


@pytest.mark.slow
def test_another_workdir_translates_the_same_sources(tmp_path, capsys):
    save(tmp_path / "other", make_parts(), 0)
    result = systems.baseline_system(tmp_path / "other", "latest", DATASET, ("en", "de"))
    assert (result.label, result.name) == ("other", "other, checkpoint 0")
    assert "warning: other, checkpoint 0: 2 translations are cut at" in capsys.readouterr().err
    trained = make_trained()
    assert result.translations == evaluator.CheckpointEvaluator(DATASET).evaluate(trained).translations
    assert result.run.num_params == trained.model.num_params()
    mine = systems.evaluated(tmp_path / "mine" / "other", trained, ["x"] * 3)
    pair = systems.label_pair(result, tmp_path / "other", mine)
    assert [each.label for each in pair] == [tmp_path.name, "mine"]
    same = systems.label_pair(result, tmp_path / "other", systems.evaluated(tmp_path / "other", trained, ["x"] * 3))
    assert [each.label for each in same] == ["checkpoint 0", "checkpoint 7"]


def test_a_file_of_translations_needs_no_model(tmp_path):
    path = write(tmp_path / "theirs.txt", ["x", "y", "z"])
    result = systems.baseline_system(path, "latest", DATASET, ("en", "de"))
    assert result == systems.System("theirs.txt", "theirs.txt", ["x", "y", "z"], None)


def test_what_cannot_be_compared_is_refused(tmp_path):
    save(tmp_path / "other", make_parts(), 0)
    (tmp_path / "empty").mkdir()
    cases = {
        write(tmp_path / "short", ["x"]): r"each of the 3 sentences of mine, got 1 lines",
        str(tmp_path / "empty"): "expected a workdir of train.py or a file of translations",
        str(tmp_path / "none"): "there is no such file",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            systems.baseline_system(path, "latest", DATASET, ("en", "de"))
    for languages in (("en", "fr"), ("fr", "de")):
        message = f"no direction {' to '.join(languages)}: this model translates en-de; name a model of the same"
        with pytest.raises(UserError, match=message):
            systems.baseline_system(tmp_path / "other", "latest", DATASET, languages)
    with pytest.raises(UserError, match="expected latest, best"):
        systems.baseline_system(tmp_path / "other", "99", DATASET, ("en", "de"))


def test_the_newest_translations_of_a_set_are_found(tmp_path):
    """By step, not by name, and never those of other sentences or of other decode fields."""
    folder, trained = tmp_path / "translations", make_trained()
    with pytest.raises(
        UserError, match=r"expected translations of mine .* found none of these sentences; run python eval.py"
    ):
        systems.newest_translations(tmp_path, DATASET)
    results.result_name(tmp_path, trained, DATASET)
    other = DATASET._replace(references=[["the", "second", "set"]])
    for name in (
        "90.mine.txt",
        "100.mine.txt",
        "200.mine.beam_size=1.txt",
        f"300.mine-{other.digest[:8]}.txt",
        "400.a.txt",
    ):
        (folder / name).write_text("")
    assert systems.newest_translations(tmp_path, DATASET) == folder / "100.mine.txt"
    (folder / "110-best-average-3.mine.txt").write_text("")
    assert systems.newest_translations(tmp_path, DATASET).name == "110-best-average-3.mine.txt"
    assert systems.newest_translations(tmp_path, other).name == f"300.mine-{other.digest[:8]}.txt"
    results.result_name(tmp_path, trained, DATASET._replace(name="mine.en-de"))
    (folder / "120.mine.en-de.txt").write_text("")
    assert systems.newest_translations(tmp_path, DATASET).name == "120.mine.en-de.txt"
