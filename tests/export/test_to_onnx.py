"""The exported graph gives the checkpoint's features in onnxruntime, and carries what a user must know."""

from __future__ import annotations

import importlib.util
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from format_models import load

from pretrain.errors import UserError
from pretrain.export import to_onnx
from pretrain.export.parity import ParityError
from pretrain.export.proof import Proof
from pretrain.export.source import RunWeights
from pretrain.models.backbone import Backbone

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def open_graph(folder: Path) -> Any:
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Export:
    folder: Path
    source: RunWeights
    model: Backbone
    proof: Proof
    said: tuple[str, str]  # on standard output and error


@pytest.fixture(scope="module")
def with_registers(tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("onnx")
    source, model = load("registers", folder)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
        proof = to_onnx.write(folder / "out", source, model)
    return Export(folder / "out", source, model, proof, (out.getvalue(), error.getvalue()))


def test_a_graph_for_any_batch_gives_features_and_tokens(with_registers: Export) -> None:
    proof = with_registers.proof
    assert set(proof.matched) == set(with_registers.source.state)
    assert proof.max_abs_difference is not None
    assert proof.tolerance is not None
    assert proof.max_abs_difference <= proof.tolerance
    session = open_graph(with_registers.folder)
    (images,) = session.get_inputs()
    assert (images.name, images.shape) == ("images", ["batch", 3, 32, 32])
    for batch_size in (1, 5):
        values = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(batch_size))
        features, tokens = session.run(["features", "tokens"], {"images": values.numpy()})
        with torch.inference_mode():
            expected = with_registers.model.forward_features(values)
        torch.testing.assert_close(torch.from_numpy(tokens), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(features), expected[:, 0], rtol=0, atol=1e-4)


def test_a_graph_is_one_file_and_tells_how_to_feed_it_and_nothing_of_this_machine(
    with_registers: Export,
) -> None:
    assert [path.name for path in with_registers.folder.iterdir()] == ["model.onnx"]  # weights inside
    assert with_registers.said == ("", "")
    graph = onnx.load(with_registers.folder / "model.onnx")
    told = {entry.key: entry.value for entry in graph.metadata_props}
    assert tuple(json.loads(told["mean"])) == with_registers.source.mean
    assert told["interpolation"] == "bilinear"
    assert graph.opset_import[0].version == 18
    # the exporter writes down where each node was traced: paths of this machine
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)


def test_a_graph_with_another_weight_is_no_proof(with_registers: Export, tmp_path: Path) -> None:
    graph = onnx.load(with_registers.folder / "model.onnx")
    (bias,) = [tensor for tensor in graph.graph.initializer if tensor.name == "backbone.norm.bias"]
    changed = onnx.numpy_helper.to_array(bias).copy()
    changed[7] += 0.01
    bias.CopyFrom(onnx.numpy_helper.from_array(changed, bias.name))
    onnx.save(graph, tmp_path / "model.onnx")
    whole = to_onnx._PooledAndTokens(with_registers.model)
    with pytest.raises(ParityError, match="onnxruntime: features of 3 differs by"):
        to_onnx._prove(tmp_path, whole, batch_sizes=(3,))
    to_onnx._prove(with_registers.folder, whole, batch_sizes=(3,))


def test_a_swin_for_one_image_with_its_weights_in_a_file_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is for models past protobuf's limit of 2 GiB."""
    source, model = load("swin with odd maps", tmp_path)
    monkeypatch.setattr(to_onnx, "_LARGEST_FILE_BYTES", 1000)
    proof = to_onnx.write(tmp_path / "out", source, model, dynamic_batch=False)
    assert proof.files == ("model.onnx", "model.onnx.data")
    assert "one image of 32 x 32 px" in proof.note
    session = open_graph(tmp_path / "out")
    assert session.get_inputs()[0].shape == [1, 3, 32, 32]
    assert session.get_outputs()[1].shape == [1, 4, 4, 16]  # the last map
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    (features,) = session.run(["features"], {"images": images.numpy()})
    with torch.inference_mode():
        expected = model.forward_features(images).mean(dim=(1, 2))
    torch.testing.assert_close(torch.from_numpy(features), expected, rtol=0, atol=1e-4)


KINDS = ["class token, pooled by mean", "no positions", "extras", "wide images", "swin", "tokens to token"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_backbone_gives_its_features_for_any_batch(kind: str, tmp_path: Path) -> None:
    source, model = load(kind, tmp_path)
    proof = to_onnx.write(tmp_path / "out", source, model)
    assert set(proof.matched) == set(source.state)
    shape = open_graph(tmp_path / "out").get_inputs()[0].shape
    assert shape == ["batch", 3, *model.patch_embed.img_size]


def test_an_opset_that_torch_does_not_write_is_refused(tmp_path: Path) -> None:
    source, model = load("class token", tmp_path)
    with pytest.raises(UserError, match="opset 17 is older than 18"):
        to_onnx.write(tmp_path / "out", source, model, opset=17)
    assert not (tmp_path / "out").exists()


def test_absent_libraries_are_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = load("class token", tmp_path)
    find = importlib.util.find_spec
    hidden = ("onnxscript", "onnxruntime")
    monkeypatch.setattr(to_onnx, "find_spec", lambda name: None if name in hidden else find(name))
    with pytest.raises(
        UserError, match=r"needs onnxscript and onnxruntime; pip install 'pretrain\[export\]'"
    ):
        to_onnx.write(tmp_path / "out", source, model)
