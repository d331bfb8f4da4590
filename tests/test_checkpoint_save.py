"""The published folder as a whole: what is carried over, what is not, records, card, and the check at the end."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_checkpoint_format import bert, factor, llama, logits, same

from eckart.checkpoint import save as saving
from eckart.checkpoint.load import load
from eckart.checkpoint.save import save
from eckart.errors import CheckpointError, UsageError
from eckart.model import factored_modules
from eckart.report.card import render_model_card
from eckart.report.loading import Loading


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else "text")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


MODEL = {"config.json", "generation_config.json", "model.safetensors", "eckart/files.json", "eckart/tensors.json"}


def test_dense_model_is_saved_as_one(tmp_path):
    model = llama()
    assert save(model, tmp_path / "out") == tmp_path / "out"
    assert files(tmp_path / "out") == MODEL
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert same(logits(load(tmp_path / "out")), logits(model))


def test_records(tmp_path):
    report = {"perplexity": {"before": 12.5, "after": float("nan")}, "losses": [float("inf"), 1], "path": Path("a")}
    save(
        factor(llama()),
        tmp_path / "out",
        recipe_yaml="keep: 0.7\n",
        plan={"format_version": 1},
        report=report,
        report_html="<html></html>",
        card="# card",
    )
    records = tmp_path / "out" / "eckart"
    assert files(tmp_path / "out") == MODEL | {
        "README.md",
        "eckart/recipe.yaml",
        "eckart/plan.json",
        "eckart/report.json",
        "eckart/report.html",
    }
    assert (records / "recipe.yaml").read_text() == "keep: 0.7\n"
    assert json.loads((records / "plan.json").read_text()) == {"format_version": 1}
    written = json.loads((records / "report.json").read_text(), parse_constant=pytest.fail)
    assert written == {"perplexity": {"before": 12.5, "after": "nan"}, "losses": ["inf", 1], "path": "a"}
    assert (tmp_path / "out" / "README.md").read_text() == "# card"


def test_what_is_carried_over(tmp_path):
    source = tmp_path / "source"
    carried = ["tokenizer.json", "vocab.txt", "chat_template.jinja", "spiece.model", "LICENSE", "extra_settings.json"]
    carried += ["additional_chat_templates/tool.jinja"]
    write(source, *carried)
    write(source, "README.md", "modeling_x.py", "pytorch_model.bin", "training_args.bin", "old.pt", "weights.pkl")
    write(source, "model.safetensors.index.json", "other.safetensors", "adapter_config.json", "trainer_state.json")
    write(source, "all_results.json", ".secret.json", ".git/config.json", "onnx/model.json", "eckart/plan.json")
    write(source, "config.json")
    write(tmp_path, "private.json")
    (source / "linked.json").symlink_to(tmp_path / "private.json")
    save(factor(llama()), tmp_path / "out", source_folder=source)
    assert files(tmp_path / "out") == MODEL | set(carried)
    assert "LlamaForCausalLM" in (tmp_path / "out" / "config.json").read_text()


def test_tokenizer_that_is_given_replaces_the_old_one(tmp_path):
    class Tokenizer:
        vocab_files_names = {"vocab_file": "vocab.txt"}  # noqa: RUF012

        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("new")

    source = tmp_path / "source"
    write(source, "config.json", "tokenizer.json", "added_tokens.json", "vocab.txt", "chat_template.jinja")
    save(factor(llama()), tmp_path / "out", source_folder=source, tokenizer=Tokenizer(), processor=Tokenizer())
    assert files(tmp_path / "out") == MODEL | {"tokenizer.json", "chat_template.jinja"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"


def sentence_source(folder: Path, inner: str, *more: str) -> None:
    write(folder, "config_sentence_transformers.json", "README.md", "1_Pooling/config.json")
    write(folder / inner, "sentence_bert_config.json", "tokenizer.json")
    (folder / inner / "config.json").write_text('{"model_type": "bert"}')
    modules = [{"idx": number, "path": path} for number, path in enumerate([inner, "1_Pooling", *more])]
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_sentence_transformers_folder(inner, tmp_path):
    source = tmp_path / "source"
    sentence_source(source, inner, "2_Dense")
    write(source, "2_Dense/config.json", "2_Dense/code.py")
    save_file({"linear.weight": torch.ones(2, 2)}, source / "2_Dense" / "model.safetensors")
    model = factor(bert())
    save(model, tmp_path / "out", source_folder=source, card="# card")
    expected = {"config.json", "model.safetensors", "sentence_bert_config.json", "tokenizer.json"}
    expected = {str(Path(inner) / name) for name in expected}
    expected |= {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json", "README.md"}
    expected |= {"2_Dense/config.json", "2_Dense/model.safetensors", "eckart/files.json", "eckart/tensors.json"}
    assert files(tmp_path / "out") == expected
    assert (tmp_path / "out" / "README.md").read_text() == "# card"
    assert same(logits(load(tmp_path / "out")), logits(model))


def test_sentence_transformers_module_with_pickled_weights(tmp_path):
    sentence_source(tmp_path / "source", "", "2_Dense")
    write(tmp_path / "source", "2_Dense/pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"2_Dense/pytorch_model\.bin.*SentenceTransformer"):
        save(factor(bert()), tmp_path / "out", source_folder=tmp_path / "source")
    assert not (tmp_path / "out").exists()


def test_sentence_transformers_loads_it(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "one": 2, "two": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    encoder = bert().bert
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    sentence_transformers.SentenceTransformer(str(tmp_path / "encoder"), device="cpu").save(str(tmp_path / "source"))
    save(factor(encoder), tmp_path / "out", source_folder=tmp_path / "source")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert factored_modules(loaded)
    assert loaded.encode(["one two", "two"]).shape == (2, 32)


def test_source_is_left_alone_and_not_written_into(tmp_path):
    model = factor(llama())
    save(llama(), tmp_path / "source")
    before = {name: (tmp_path / "source" / name).read_bytes() for name in files(tmp_path / "source")}
    for output in (tmp_path / "source", tmp_path / "source" / "out"):
        with pytest.raises(CheckpointError, match=r"source.*--output-dir"):
            save(model, output, source_folder=tmp_path / "source", overwrite=True)
    assert before == {name: (tmp_path / "source" / name).read_bytes() for name in files(tmp_path / "source")}


@pytest.mark.parametrize("fault", ["number", "guard", "config"])
def test_what_was_written_is_held_against_the_model(fault, tmp_path, monkeypatch):
    model = factor(llama())
    write_all = type(model).save_pretrained

    def corrupted(self, folder, **options):
        write_all(self, folder, **options)
        path = Path(folder) / "model.safetensors"
        tensors = {name: tensor for name, tensor in self.state_dict().items() if name != "lm_head.weight"}
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        if fault == "number":
            tensors["model.norm.weight"] = torch.ones(31)
        elif fault == "guard":
            del tensors[name]
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        if fault == "config":
            config = json.loads((Path(folder) / "config.json").read_text())
            config["quantization_config"]["modules"].popitem()
            (Path(folder) / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(type(model), "save_pretrained", corrupted)
    with pytest.raises(CheckpointError, match="nothing was published"):
        save(model, tmp_path / "out")
    assert files(tmp_path) == set()


def test_not_a_transformers_model(tmp_path):
    with pytest.raises(UsageError, match=r"Linear.*transformers model"):
        save(torch.nn.Linear(2, 2), tmp_path / "out")


def test_disk_space_is_asked_for_before_writing(tmp_path, monkeypatch):
    asked = []
    publish = saving.publish

    def spy(*args, needed_bytes, **options):
        asked.append(needed_bytes)
        return publish(*args, needed_bytes=needed_bytes, **options)

    monkeypatch.setattr(saving, "publish", spy)
    save(factor(llama()), tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0.5 * size < asked[0] < 1.5 * size


# -- the card --------------------------------------------------------------------------------------------


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_card_states_what_it_was_given():
    measured = {
        "parameters": {"original": 1234567, "eckart": 890123},
        "perplexity": {"original": 18.25, "eckart": 18.912345},
        "a | b": {"eckart": "same"},
    }
    card = render_model_card(
        "me/smol-70",
        base_model="HuggingFaceTB/SmolLM2-135M",
        loading=Loading("AutoModelForCausalLM"),
        method="drone",
        form="pivoted",
        command="eckart compress HuggingFaceTB/SmolLM2-135M --keep 0.7",
        measured=measured,
        tags=["demo"],
        license="apache-2.0",
        language="en",
        pipeline_tag="text-generation",
    )
    about = metadata(card)
    assert about["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert about["library_name"] == "transformers"
    assert {"eckart", "demo"} <= set(about["tags"])
    assert (about["license"], about["language"], about["pipeline_tag"]) == ("apache-2.0", "en", "text-generation")
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1).splitlines()
    assert example[0].startswith("import eckart")
    assert 'AutoModelForCausalLM.from_pretrained("me/smol-70")' in card
    assert "| measured | original | eckart |" in card
    assert "| parameters | 1,234,567 | 890,123 |" in card
    assert "| perplexity | 18.25 | 18.91 |" in card
    assert "| a \\| b |  | same |" in card
    assert "refuses to load" in card
    assert "--keep 0.7" in card
    table = card[card.index("| measured") : card.index("## How")]
    assert "\n\n|" not in table


def test_card_without_numbers_has_none(tmp_path):
    local = tmp_path / "my-model"
    local.mkdir()
    card = render_model_card("smol-70", base_model=str(local))
    assert "base_model" not in metadata(card)
    assert str(tmp_path) not in card
    assert "my-model" in card
    assert "Measured" not in card
    assert not re.search(r"\d", card.replace("smol-70", "").split("---", 2)[2])


SENTENCE = Loading("SentenceTransformer", "sentence_transformers", "", library="sentence-transformers")


def test_card_for_sentence_transformers():
    card = render_model_card("me/minilm", loading=SENTENCE, measured={"cosine": 0.987654})
    assert metadata(card)["library_name"] == "sentence-transformers"
    assert 'SentenceTransformer("me/minilm")' in card
    assert "| cosine | 0.9877 |" in card
