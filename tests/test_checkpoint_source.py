"""Source folders: what is refused before anything is loaded, and that the refusal says where and what to do."""

import json
import struct
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

from eckart.checkpoint import source
from eckart.checkpoint.source import inspect_source, resolve
from eckart.errors import CheckpointError, ModelError
from eckart.storage import shards

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c.weight": torch.zeros(2, 0),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    save_file(TENSORS, folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a.weight": TENSORS["a.weight"]}, folder / "model-1.safetensors")
    save_file({"b.weight": TENSORS["b.weight"]}, folder / "model-2.safetensors")
    write_index(folder, {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def configure(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder: Path, *words: str, error: type[Exception] = CheckpointError, **options) -> str:
    with pytest.raises(error) as caught:
        inspect_source(folder, **options)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


# -- what is read ----------------------------------------------------------------------------------------


def test_single_file(single):
    report = inspect_source(single)
    assert report.folder == single
    assert report.config["model_type"] == "llama"
    assert report.weight_files == (single / "model.safetensors",)
    assert report.tensors["a.weight"] == ("F32", (3, 4), single / "model.safetensors")
    assert report.tensors["b.weight"].dtype == "BF16"
    assert report.tensors["c.weight"].shape == (2, 0)
    assert report.warnings == []


def test_shards(sharded):
    report = inspect_source(sharded)
    assert [path.name for path in report.weight_files] == ["model-1.safetensors", "model-2.safetensors"]
    assert report.tensors["b.weight"].file.name == "model-2.safetensors"
    assert report.warnings == []


def test_every_header_that_safetensors_writes_is_accepted(tmp_path):
    kinds = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16]
    kinds += [torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(kind): torch.zeros(3, 2).to(kind) for kind in kinds} | {"scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "all.safetensors", metadata={"format": "pt"})
    header = shards.read_header(tmp_path / "all.safetensors")
    assert {name: entry.shape for name, entry in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "all.safetensors").items()
    }


def test_single_file_wins_over_an_index_with_a_warning(sharded):
    save_file(TENSORS, sharded / "model.safetensors")
    report = inspect_source(sharded)
    assert [path.name for path in report.weight_files] == ["model.safetensors"]
    assert "model.safetensors.index.json" in report.warnings[0]
    assert "Delete" in report.warnings[0]
    assert "model-1.safetensors" in report.warnings[1]


def test_weights_named_by_the_config(single):
    (single / "model.safetensors").rename(single / "other.safetensors")
    refused(single, "other.safetensors", "model.safetensors.index.json")
    configure(single, transformers_weights="other.safetensors")
    assert inspect_source(single).weight_files == (single / "other.safetensors",)
    configure(single, transformers_weights="../model/other.safetensors")
    refused(single, "transformers_weights", "../model/other.safetensors", "source you trust")
    configure(single, transformers_weights=["a"])
    refused(single, "transformers_weights", "['a']")
    configure(single, transformers_weights="pytorch_model.bin")
    refused(single, "pytorch_model.bin", "not a safetensors file")


# -- untrusted input -------------------------------------------------------------------------------------


def test_pickle_only(single):
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(single, "pytorch_model.bin", str(single), "Convert them", "save_pretrained")


def test_no_weights_at_all(single):
    (single / "model.safetensors").unlink()
    refused(single, "no model.safetensors", "config.json", "Download")


@pytest.mark.parametrize(
    "name",
    ["../model-2.safetensors", "/etc/model-2.safetensors", "x/../../y.safetensors", "..\\y.safetensors",
     "C:\\y.safetensors", "y\0.safetensors", "y\ud800.safetensors", 7],
)  # fmt: skip
def test_weight_map_that_leaves_the_folder(name, sharded):
    write_index(sharded, {"a.weight": "model-1.safetensors", "b.weight": name})
    refused(sharded, "model.safetensors.index.json", "b.weight", repr(name), "source you trust")


def test_weight_map_with_a_name_that_no_file_can_have(sharded, single):
    name = "x" * 300 + ".safetensors"
    write_index(sharded, {"a.weight": "model-1.safetensors", "b.weight": name})
    refused(sharded, f"shard {name} is missing")
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    refused(single, name, "config.json")


def test_weight_map_with_pickled_shards(sharded):
    write_index(sharded, {"a.weight": "model-1.safetensors", "b.weight": "model-2.bin"})
    refused(sharded, "b.weight", "model-2.bin", "Convert")


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {}}])
def test_index_without_a_map(content, sharded):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(sharded, "model.safetensors.index.json", "Download")


@pytest.mark.parametrize("content", [{}, {"metadata": None}])
def test_index_that_transformers_cannot_read_is_told_what_to_add(content, sharded):
    mapping = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping, **content}))
    refused(sharded, "model.safetensors.index.json", 'Add "metadata": {}')


READ_TOO = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "vocab.txt", "modeling.py", "LICENSE",
            "additional_chat_templates/rag.jinja", "1_Pooling/config.json"]  # fmt: skip


@pytest.mark.parametrize("name", READ_TOO)
def test_no_file_that_is_read_or_carried_over_is_a_link_to_elsewhere(name, single, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (single / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (single / name).parent.mkdir(exist_ok=True)
    (single / name).symlink_to(tmp_path / "secret")
    refused(single, str(single / name), str(tmp_path / "secret"), "Copy")
    with pytest.raises(CheckpointError, match="outside the folder"):
        resolve(str(single))  # which every command begins with
    (single / name).unlink()
    (single / "inside").write_text("{}")
    (single / name).symlink_to(single / "inside")
    (single / "training.log").symlink_to(tmp_path / "secret")  # which nothing reads
    assert resolve(str(single)) == single
    inspect_source(single)


def test_shard_linked_from_outside(sharded, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (sharded / "model-2.safetensors").rename(outside)
    (sharded / "model-2.safetensors").symlink_to(outside)
    refused(sharded, str(sharded / "model-2.safetensors"), str(outside), "Copy")


def test_folder_of_shards_linked_from_outside(sharded, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (sharded / "model-2.safetensors").rename(tmp_path / "elsewhere" / "model-2.safetensors")
    (sharded / "sub").symlink_to(tmp_path / "elsewhere")
    write_index(sharded, {"a.weight": "model-1.safetensors", "b.weight": "sub/model-2.safetensors"})
    refused(sharded, "sub/model-2.safetensors", "Copy")


def test_hub_cache_links_are_fine(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1").write_text('{"model_type": "llama"}')
    save_file(TENSORS, repository / "blobs" / "2")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/2")
    assert len(inspect_source(snapshot).tensors) == 3
    (tmp_path / "link").symlink_to(snapshot)
    assert len(inspect_source(tmp_path / "link").tensors) == 3
    (snapshot / "model.safetensors").unlink()
    (repository / "secret").write_bytes((repository / "blobs" / "2").read_bytes())
    (snapshot / "model.safetensors").symlink_to("../../secret")
    refused(snapshot, "model.safetensors", "outside")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/2")
    (repository / "blobs").rename(tmp_path / "private")
    (repository / "blobs").symlink_to(tmp_path / "private")  # a folder that is a link opens all that is in it
    refused(snapshot, "outside")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code(name, single):
    content = json.loads((single / "config.json").read_text())
    (single / name).write_text(json.dumps(content | {"auto_map": {"AutoModel": "modeling_x.Model"}}))
    refused(single, f"auto_map in {single / name}", "modeling_x.Model", "--trust-remote-code")
    report = inspect_source(single, trust_remote_code=True)
    assert any("modeling_x.Model" in warning for warning in report.warnings)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{not json", b"", ["garbled"]),
        (b"[]", b"", ["garbled"]),
        (b"true", b"", ["garbled"]),
        (b"3", b"", ["garbled"]),
        (b'{"w": {}, "w": {}}', b"", ["duplicate key 'w'"]),
        (b"[" * 100_000, b"", ["garbled"]),
        ({"w": F32 | {"dtype": "F31"}}, bytes(8), ["'w'", "F31"]),
        ({"w": F32 | {"shape": [-2]}}, bytes(8), ["'w'", "[-2]"]),
        ({"w": F32 | {"shape": [True]}}, bytes(8), ["'w'", "True"]),
        ({"w": F32 | {"shape": [2**63]}}, bytes(8), ["'w'"]),
        ({"w": F32 | {"shape": [1] * 65}}, bytes(8), ["'w'"]),
        ({"w": F32 | {"data_offsets": [0]}}, bytes(8), ["'w'"]),
        ({"w": 3}, bytes(8), ["'w'"]),
        ({"w": F32 | {"data_offsets": [0, 4]}}, bytes(4), ["'w'", "4 bytes"]),
        ({"w": F32 | {"data_offsets": [8, 0]}}, bytes(8), ["'w'"]),
        ({"w": F32, "v": F32 | {"data_offsets": [4, 12]}}, bytes(12), ["'v'", "overlaps"]),
        ({"w": F32, "v": F32 | {"data_offsets": [12, 20]}}, bytes(20), ["'v'", "gap"]),
        ({"w": F32}, bytes(9), ["no tensor owns"]),
        ({"w": F32, "__metadata__": {"a": {"b": 1}}}, bytes(8), ["__metadata__ is not of texts"]),
        ({"w": F32, "__metadata__": []}, bytes(8), ["__metadata__ is not of texts"]),
        (json.dumps({"w": F32}).encode("utf-16"), bytes(8), ["garbled"]),
        (b'{"\\ud800": %s}' % json.dumps(F32).encode(), bytes(8), ["garbled", "surrogates"]),
    ],
)
def test_garbled_header(header, data, words, single):
    write_raw(single / "model.safetensors", header, data)
    refused(single, str(single / "model.safetensors"), "Download", *words)


def test_huge_header_is_not_read(single):
    write_raw(single / "model.safetensors", {"w": F32}, bytes(8), length=2**60)
    refused(single, "model.safetensors", str(2**60), str(shards.HEADER_LIMIT))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_config_that_is_no_object(content, single):
    (single / "config.json").write_bytes(content)
    refused(single, "config.json", "Download")


# -- damaged and incomplete ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5, 40, -3])
def test_truncated_shard_names_the_file_and_its_size(size, sharded):
    path = sharded / "model-2.safetensors"
    content = path.read_bytes()[: size if size >= 0 else len(path.read_bytes()) + size]
    path.write_bytes(content)
    refused(sharded, str(path), "truncated", str(len(content)), "b.weight", "Download")


def test_everything_missing_is_listed_at_once(sharded):
    mapping = {"a.weight": "model-1.safetensors", "lost.weight": "model-1.safetensors"}
    write_index(sharded, mapping | {"b.weight": "model-2.safetensors", "d.weight": "model-3.safetensors"})
    (sharded / "model-2.safetensors").unlink()
    message = refused(sharded, "model-2.safetensors", "model-3.safetensors", "lost.weight", "Download")
    assert "b.weight, d.weight" in message
    assert "a.weight" not in message


def test_extra_duplicate_and_misplaced_tensors_are_reported(sharded):
    save_file({"b.weight": TENSORS["b.weight"], "extra": torch.ones(1)}, sharded / "model-2.safetensors")
    save_file({"a.weight": TENSORS["a.weight"], "b.weight": TENSORS["b.weight"]}, sharded / "model-1.safetensors")
    warnings = inspect_source(sharded).warnings
    assert any("extra" in warning for warning in warnings)
    assert any("b.weight is in several shards" in warning for warning in warnings)
    write_index(sharded, {"a.weight": "model-2.safetensors", "b.weight": "model-1.safetensors"})
    assert any("the index says model-2.safetensors" in warning for warning in inspect_source(sharded).warnings)


def test_distributed_checkpoint(single):
    (single / "shard-00001-model-00001-of-00002.safetensors").touch()
    refused(single, "shard-00001-model", "save_pretrained")


# -- models that are no source ---------------------------------------------------------------------------


def test_already_factored(single):
    configure(single, quantization_config={"quant_method": "eckart", "format_version": 1, "modules": {}})
    refused(single, str(single), "quant_method", "original", "eckart.densify", error=ModelError)
    said = refused(single, "Inspect the original model instead.", error=ModelError, purpose="inspect")
    assert "ompress the" not in said
    (single / "eckart").mkdir()
    (single / "eckart" / "report.json").write_text("{}")
    refused(single, f"or see what this folder holds: eckart report {single}", error=ModelError, purpose="inspect")


def test_what_is_inspected_is_not_told_to_be_compressed(single):
    described = {"quant_method": "eckart", "adaptive": {"behaviors": {"early-exit": {}}}}
    for given in (described, {"quant_method": "gptq"}):
        configure(single, quantization_config=given)
        assert "Compress the" in refused(single, error=ModelError)
        assert "ompress" not in refused(single, "Inspect the", error=ModelError, purpose="inspect")


@pytest.mark.parametrize("nested", [False, True])
def test_quantized(nested, single):
    quantized = {"quantization_config": {"quant_method": "gptq"}}
    configure(single, **({"text_config": quantized} if nested else quantized))
    place = "text_config.quantization_config" if nested else "quantization_config"
    refused(single, place, "gptq", "unquantized", error=ModelError)


def test_adapter(single):
    (single / "adapter_config.json").write_text("{}")
    refused(single, "adapter_config.json", "merge_and_unload", error=ModelError)


# -- sentence-transformers -------------------------------------------------------------------------------


def test_transformer_in_a_subfolder(single):
    outer = single.parent / "sentence"
    outer.mkdir()
    single.rename(outer / "0_Transformer")
    modules = [{"idx": 0, "path": "0_Transformer"}, {"idx": 1, "path": "1_Pooling"}]
    (outer / "modules.json").write_text(json.dumps(modules))
    assert resolve(str(outer)) == outer
    assert inspect_source(outer).folder == outer / "0_Transformer"
    (outer / "modules.json").write_text(json.dumps([{"idx": 0, "path": "../model"}]))
    refused(outer, "modules.json", "../model", "source you trust")
    (outer / "modules.json").write_text("{}")
    refused(outer, "modules.json", "Download")


# -- where it comes from ---------------------------------------------------------------------------------


def test_resolve_a_folder(single, monkeypatch):
    assert resolve(str(single)) == single
    monkeypatch.chdir(single.parent)
    assert resolve("model") == Path("model")


def unresolved(name: str, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    for word in (name, *words):
        assert word in str(caught.value)


def test_a_name_that_no_path_can_have():
    with pytest.raises(CheckpointError, match="too long for a path"):
        resolve("x" * 300)


@pytest.mark.parametrize("name", ["encodr", "./encodr", "ENCODER"])
def test_a_name_that_is_nowhere_is_told_without_names_of_errors_and_with_the_nearest(name, single, monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr(source, "snapshot_download", fail)
    monkeypatch.chdir(single.parent)
    single.rename("encoder")
    Path("encodr.txt").touch()
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    assert "Did you mean encoder?" in str(caught.value)
    assert "Error" not in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        resolve("quite-another")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "a/b/c", "..", "~no-such-user/model", "org/"])
def test_resolve_a_path_that_does_not_exist(name):
    if name == "..":
        unresolved(name, "no config.json")
    else:
        unresolved(name, "does not exist", "org/model")


def test_resolve_a_folder_without_config(single):
    unresolved(str(single.parent), "no config.json", "found: model", f"Did you mean {single}?")
    (single / "config.json").unlink()
    unresolved(str(single), "no config.json", "model.safetensors", "save_pretrained")
    refused(single, "no config.json", "model.safetensors")
    refused(single / "nothing", "not a folder", "org/model")


def test_resolve_a_file(single):
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(single / "config.json"))


def test_resolve_offline():
    unresolved("org/model-that-nobody-has", "cache", "HF_HUB_OFFLINE", "give the folder")
    unresolved("a--b..c", "valid name")


@pytest.mark.parametrize(
    ("error", "words"),
    [(GatedRepoError, ["gated", "hf auth login"]), (RepositoryNotFoundError, ["neither a folder", "hf auth login"]),
     (RevisionNotFoundError, ["revision 'v9'", "--revision"])],
)  # fmt: skip
def test_resolve_explains_the_hub(error, words, monkeypatch):
    def fail(*_, **__):
        raise error.__new__(error, "no")  # its __init__ wants a response of the HTTP library

    monkeypatch.setattr(source, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        resolve("org/model", "v9")
    for word in ("org/model", *words):
        assert word in str(caught.value)


def test_resolve_downloads_no_pickles(single, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(single)

    monkeypatch.setattr(source, "snapshot_download", download)
    assert resolve("org/model", "v1") == single
    assert asked["revision"] == "v1"
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])
    resolve("org/model", trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"]
    (single / "model.safetensors").unlink()
    unresolved("org/model", "no safetensors", "convert")
    (single / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve("org/model")
