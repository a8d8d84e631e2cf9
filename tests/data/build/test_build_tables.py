from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from build_material import build, images_and_labels, in_order, png
from small_shards import jpeg

from pretrain.data.manifest import Manifest
from pretrain.errors import DataError

arrow = pytest.importorskip("pyarrow", reason="pretrain[parquet] is not installed")
ipc = pytest.importorskip("pyarrow.ipc")
parquet = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "dog", "owl"]
FEATURES = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
Rows = list[tuple[bytes, int | None]]


def rows(first: int, count: int) -> Rows:
    return [
        (jpeg(number, 12, 14) if number % 2 else png(number), number % 3)
        for number in range(first, first + count)
    ]


def table(content: Rows, columns: tuple[str, str] = ("image", "label"), features: Any = FEATURES) -> Any:
    images = arrow.array([{"bytes": data, "path": "x"} for data, _ in content])
    made = arrow.table({columns[0]: images, columns[1]: arrow.array([label for _, label in content])})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return made.replace_schema_metadata(metadata) if features else made


def write_arrow(path: Path, content: Rows, stream: bool = True) -> None:
    made = table(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = ipc.new_stream if stream else ipc.new_file
    with new(str(path), made.schema) as writer:
        writer.write_table(made, max_chunksize=2)


def test_the_layout_of_the_hub_gives_splits_labels_and_class_names(tmp_path: Path) -> None:
    data = tmp_path / "in" / "data"
    data.mkdir(parents=True)
    contents = {
        "train-00000-of-00002": rows(0, 5),
        "train-00001-of-00002": rows(5, 2),
        "validation-00000-of-00001": rows(20, 3),
    }
    for name, content in contents.items():
        parquet.write_table(table(content), data / f"{name}.parquet", row_group_size=2)
    build(tmp_path / "in", tmp_path / "out")
    first, second, val = contents.values()
    assert images_and_labels(tmp_path / "out", "train") == in_order(first + second)
    assert images_and_labels(tmp_path / "out", "val") == in_order(val)
    assert Manifest.load(tmp_path / "out").class_names == tuple(NAMES)


def test_plain_columns_of_bytes_are_found_or_named(tmp_path: Path) -> None:
    content = rows(0, 3)
    made = arrow.table(
        {
            "jpg": [data for data, _ in content],
            "thumbnail": [png(99)] * 3,
            "category": [label for _, label in content],
        }
    )
    parquet.write_table(made, tmp_path / "a.parquet")
    build(tmp_path / "a.parquet", tmp_path / "one", split="test")
    assert images_and_labels(tmp_path / "one", "test") == in_order((data, None) for data, _ in content)
    build(tmp_path / "a.parquet", tmp_path / "two", image_column="thumbnail", label_column="category")
    assert images_and_labels(tmp_path / "two") == in_order((png(99), label) for _, label in content)


@pytest.mark.parametrize("stream", [True, False])
def test_a_saved_data_set_is_read_in_its_own_order(tmp_path: Path, stream: bool) -> None:
    contents = {"train": [rows(0, 4), rows(4, 3)], "test": [rows(10, 2)]}
    source = tmp_path / "in"
    for split, parts in contents.items():
        names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
        for name, content in zip(names, parts, strict=True):
            write_arrow(source / split / name, content, stream)
        state = {"_data_files": [{"filename": name} for name in names]}
        (source / split / "state.json").write_text(json.dumps(state))
    (source / "dataset_dict.json").write_text(json.dumps({"splits": list(contents)}))
    build(source, tmp_path / "out")
    for split, parts in contents.items():
        assert images_and_labels(tmp_path / "out", split) == in_order(row for part in parts for row in part)
    build(source / "test", tmp_path / "other")
    assert images_and_labels(tmp_path / "other", "test") == in_order(contents["test"][0])


def test_rows_without_an_image_are_listed_as_rejected(tmp_path: Path) -> None:
    made = table([*rows(0, 3), (b"", 1)])
    parquet.write_table(made, tmp_path / "a.parquet")
    result, _ = build(tmp_path / "a.parquet", tmp_path / "out")
    assert result.num_rejected == 1
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {"split": "train", "source": "a.parquet#3", "reason": "empty"}


def test_an_unfinished_build_reads_on_from_its_spool(tmp_path: Path) -> None:
    content = rows(0, 6)
    parquet.write_table(table([*content, (b"", 1), (b"", 2)]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="2 of 8 images are bad"):
        build(tmp_path / "a.parquet", tmp_path / "out", samples_per_shard=2)
    for path in (tmp_path / "out").glob("*.tar"):
        path.unlink()
    spool = tmp_path / "out" / ".build" / "listing" / "spool.bin"
    assert spool.stat().st_size == sum(len(data) for data, _ in content)
    build(tmp_path / "a.parquet", tmp_path / "out", samples_per_shard=2, max_bad_ratio=0.5, num_workers=2)
    assert images_and_labels(tmp_path / "out") == in_order(content)
    assert not spool.exists()


def struct_of_paths() -> Any:
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    return arrow.table({"image": arrow.array([{"bytes": None, "path": "a.jpg"}], type=kind)})


@pytest.mark.parametrize(
    ("made", "settings", "told"),
    [
        ({"a": [1]}, {}, "no single column of encoded images"),
        ({"a": [b"1"], "b": [b"2"]}, {}, "holds several: a, b.*--image-column"),
        ({"a": [b"1"], "b": [2]}, {"image_column": "b"}, "--image-column b holds no encoded images"),
        ({"image": [b"1"]}, {"label_column": "kind"}, "no column 'kind'; columns: image"),
        ({"image": [b"1"], "label": ["cat"]}, {}, "'label' holds string, not whole numbers"),
        ({"image": [b"1"], "label": [-2]}, {}, "label -2 in 'label' is no class index"),
        (None, {}, "row 0 holds the path 'a.jpg' instead of an image"),
    ],
)
def test_tables_that_do_not_say_what_they_hold_are_refused(
    tmp_path: Path, made: dict[str, list[Any]] | None, settings: dict[str, str], told: str
) -> None:
    parquet.write_table(struct_of_paths() if made is None else arrow.table(made), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=told):
        build(tmp_path / "a.parquet", tmp_path / "out", **settings)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    parquet.write_table(table(rows(0, 20)), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as a table .*; fetch this file again"):
        build(tmp_path / "a.parquet", tmp_path / "out")


def test_without_pyarrow_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what an import of an absent package meets
    with pytest.raises(DataError, match=r"need pyarrow; run `pip install 'pretrain\[parquet\]'`"):
        build(tmp_path / "a.parquet", tmp_path / "out")
