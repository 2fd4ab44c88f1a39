"""Writers outside run folders overwrite nothing that Assay did not write."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from test_graphml import GRAPH

from assay import charts
from assay.errors import InputError
from assay.io import circuits, files, graphml, pair_files, supernodes
from assay.io.attribution_graphs import write_graph
from assay.targets import max_of_k, residual_relu

CIRCUIT = circuits.Circuit(
    {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 2},
    {"input": circuits.Scored(None, True), "logits": circuits.Scored(0.5, True)},
    {"input->logits": circuits.Scored(1.0, True)},
)
MODEL = max_of_k.MaxOfK(3, 2, 2, generator=torch.Generator().manual_seed(0))
MARKED = {
    "circuit.json": lambda path: circuits.write_circuit(path, CIRCUIT),
    "supernodes.json": lambda path: supernodes.write_supernodes(path, {}),
    "max.safetensors": lambda path: max_of_k.save(path, MODEL),
    "relu.safetensors": lambda path: residual_relu.save(
        path, residual_relu.ResidualReLU(3, 2, 2, 2)
    ),
    "w.safetensors": lambda path: files.save_tensors(path, {"w": torch.ones(2)}),
}
UNMARKED = {
    "graph.json": lambda path: write_graph(path, GRAPH),
    "graph.graphml": lambda path: graphml.write_graphml(path, GRAPH),
    "circuit.graphml": lambda path: circuits.write_graphml(path, CIRCUIT),
    "pairs.jsonl": lambda path: pair_files.write_pairs(path, []),
    "picture.png": lambda path: charts.png(None, path),  # refused before it is drawn
}
FOREIGN = (b"", b"mine", b"[1]", json.dumps({"format": "assay-other/1"}).encode(), b"[" * 10**5)


def put_tensors_of_others(path):
    save_file({"w": torch.ones(2)}, path, metadata={"format": "pt"})
    return path.read_bytes()


@pytest.mark.parametrize("name", [*MARKED, *UNMARKED])
def test_files_of_others_stay(name, tmp_path):
    path = tmp_path / name
    write = {**MARKED, **UNMARKED}[name]
    for data in (*FOREIGN, put_tensors_of_others(path)):
        path.write_bytes(data)
        with pytest.raises(InputError, match="is not a file that Assay would write there"):
            write(path)
        assert path.read_bytes() == data
    path.unlink()
    for aim in (tmp_path / "nothing", tmp_path / "mine"):
        (tmp_path / "mine").write_bytes(b"mine")
        path.symlink_to(aim)
        with pytest.raises(InputError, match="is not a file that Assay would write there"):
            write(path)
        assert path.is_symlink()
        path.unlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize("name", MARKED)
def test_a_link_to_a_file_of_our_own_stays(name, tmp_path):
    aim, path = tmp_path / f"own-{name}", tmp_path / name
    MARKED[name](aim)
    path.symlink_to(aim)
    before = aim.read_bytes()
    with pytest.raises(InputError, match="is not a file that Assay would write there"):
        MARKED[name](path)
    assert path.is_symlink()
    assert aim.read_bytes() == before


@pytest.mark.parametrize("name", MARKED)
def test_files_of_our_own_are_written_again(name, tmp_path):
    path = tmp_path / name
    MARKED[name](path)
    before = path.read_bytes()
    MARKED[name](path)
    assert path.read_bytes() == before
