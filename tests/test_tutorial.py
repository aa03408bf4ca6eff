"""The notebook docs/tutorial.ipynb runs from its first cell to its last."""

import ast
import json
import sys

import pytest

from tests.conftest import ROOT
from tests.helpers.processes import data_flags, environment, write_data

PATH = ROOT / "docs" / "tutorial.ipynb"
TINY = {
    "data.name": "text",
    "data.vocab_size": 286,
    "model.emb_dim": 32,
    "model.mlp_dim": 64,
    "model.num_heads": 2,
    "data.num_buckets": 1,
    "optimizer.warmup_steps": 2,
    "train.batch_tokens": 512,
    "train.num_steps": 4,
    "train.eval_every_steps": 4,
    "train.checkpoint_every_steps": 4,
    "decode.beam_size": 2,
    "decode.max_extra_length": 4,
    "decode.min_length": 4,
}


def test_it_is_kept_without_outputs():
    cells = json.loads(PATH.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}
    assert max(len(line.rstrip()) for cell in cells for line in cell["source"]) <= 120


@pytest.mark.slow
def test_it_trains_translates_and_draws_attention(tmp_path):
    """With a model and a run so small that it learns nothing."""
    nbformat = pytest.importorskip("nbformat", reason="the dev extra is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the dev extra is not installed")
    pytest.importorskip("ipykernel", reason="the dev extra is not installed")
    notebook = nbformat.read(PATH, as_version=4)
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    flags = [f"--config.{name}={value}" for name, value in TINY.items()]
    flags += data_flags(write_data(tmp_path / "data"))
    given = f"workdir, flags = {str(tmp_path / 'run')!r}, {flags!r}"
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": ROOT / "docs"}})
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable  # whichever environment a kernel of that name is installed for
    settings = {name: value for name, value in environment(1).items() if not name.startswith("PYTEST")}
    client.execute(env=settings)
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert "step 4/4 · loss " in "".join(output.text for output in outputs[2])
    assert "'step': 4" in outputs[3][-1].data["text/plain"]
    assert len(ast.literal_eval(outputs[4][-1].data["text/plain"])) == 3
    assert len(outputs[5][-1].text.splitlines()) == 4  # hypotheses
    assert "am Bahnhof" in outputs[6][-1].data["text/plain"]
    assert "2 layers, 2 heads" in outputs[7][-1].text
    assert "<iframe srcdoc=" in outputs[8][-1].data["text/html"]
