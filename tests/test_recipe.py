"""A recipe that cannot be is refused at the field, and the message says what to write instead."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from eckart.cli.run_file import read_run
from eckart.compression.recipe import Recipe
from eckart.config import check_recipe, default_samples, merge_recipe, read_config, resolve_device
from eckart.errors import UsageError
from eckart.forms import FORMS
from eckart.methods import METHODS
from eckart.recovery.recipe import TuneRecipe

BAD_VALUES = [
    ("keep", 0, "a fraction above 0 up to 1 is meant"),
    ("keep", 1.5, "a fraction above 0 up to 1 is meant; for 1.5 % give keep: 0.015"),
    ("keep", float("nan"), "a finite number is meant"),
    ("keep", True, "not a boolean"),
    ("keep", "abc", "a number is meant"),
    ("keep", None, "a number is meant"),
    ("keep_of", "layers", "one of sites, reached, model is meant"),
    ("rank_multiple", 0, "a whole number of at least 1 is meant"),
    ("rank_multiple", True, "not a boolean"),
    ("rank_multiple", 2.5, "a whole number is meant"),
    ("num_samples", -4, "of at least 1 is meant"),
    ("max_seq_length", 1, "of at least 2 is meant"),
    ("batch_size", 0, "of at least 1 is meant"),
    ("seed", -1, "of at least 0 is meant"),
    ("allocation", "greedy", "one of uniform, loss is meant"),
    ("curvature", "none", "one of auto, sampled, labels is meant"),
    ("dtype", "int8", "one of float32, bfloat16, float16 is meant"),
    ("method", "svd_lm", "Did you mean 'svd-llm'?"),
    ("method", 5, "a word is meant"),
    ("method", "builtins.eval", "Choose one of: eckart, svd"),
    ("metric", "dron", "Did you mean 'drone'?"),
    ("form", "pivot", "Did you mean 'pivoted'?"),
    ("embeddings", "krone", "Did you mean 'kronecker'?"),
    ("targets", 5, "a word, or a list of them, is meant"),
    ("device", "gpu", "no such device here"),
    ("device", "meta", "no such device here"),
    ("seed", 2**32, "must be at most 4,294,967,295"),
    ("num_samples", 10**30, "must be at most"),
    ("model", "a\0b", "characters that no name and no path can have"),
    ("data", "\ud800", "characters that no name and no path can have"),
    ("trust_remote_code", "perhaps", "true or false is meant"),
]


@pytest.mark.parametrize("field", ["model", "data", "plan", "profile"])
def test_a_name_longer_than_any_file_s_is_refused(field):
    with pytest.raises(UsageError, match=f"here: {field} = 'a/xxx.*too long for a path or a name on the hub"):
        check_recipe(Recipe, {field: "a/" + "x" * 300}, "here")


def test_bad_value_is_refused_with_place_field_value_and_meaning():
    for field, value, problem in BAD_VALUES:
        with pytest.raises(UsageError) as refusal:
            check_recipe(Recipe, {field: value}, "--config run.yaml")
        message = str(refusal.value)
        assert message.startswith(f"--config run.yaml: {field} = {value!r}: ")
        assert problem in message
        assert Recipe.model_fields[field].description in message  # what the option is for: the way out


@pytest.mark.parametrize(
    ("where", "field", "value", "said"),
    [
        ("command line", "keep", 60.0, "--keep 60: a fraction above 0 up to 1 is meant; for 60 % give --keep 0.6 ("),
        ("command line", "keep", "60", "--keep 60: a fraction above 0 up to 1 is meant; for 60 % give --keep 0.6 ("),
        ("command line", "keep", 600, "--keep 600: a fraction above 0 up to 1 is meant ("),
        ("command line", "rounds", 9, "--rounds 9: a whole number of at least 1 and of at most 8 is meant ("),
        ("command line", "cache_memory", -1, "--cache-memory -1: a number of at least 0 is meant ("),
        ("command line", "curvature", "lables", "is meant; did you mean --curvature labels? ("),
        ("command line", "num_samples", "2.5", "--num-samples 2.5: a whole number is meant ("),
        ("eckart.compress", "keep", 60, "keep = 60: a fraction above 0 up to 1 is meant; for 60 % give keep=0.6 ("),
    ],
)  # fmt: skip
def test_a_refused_value_is_spelled_as_it_was_given(where, field, value, said):
    with pytest.raises(UsageError) as refusal:
        check_recipe(Recipe, {field: value}, where)
    assert said in str(refusal.value)
    assert "nput should" not in str(refusal.value)


def test_a_fraction_that_ends_below_one_is_told_as_that():
    with pytest.raises(
        UsageError, match=r"--warmup 6: a fraction from 0 and below 1 is meant; for 6 % give --warmup 0"
    ):
        check_recipe(TuneRecipe, {"warmup": 6}, "command line")
    with pytest.raises(UsageError, match=r"--warmup 100: a fraction from 0 and below 1 is meant \("):
        check_recipe(TuneRecipe, {"warmup": 100}, "command line")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("keeep", "did you mean 'keep'?"),
        ("zzz", f"known are: {', '.join(Recipe.model_fields)}."),
        (3, f"known are: {', '.join(Recipe.model_fields)}."),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_spelling(key, hint):
    with pytest.raises(UsageError) as refusal:
        check_recipe(Recipe, {key: 1}, "eckart.compress")
    assert str(refusal.value) == f"eckart.compress: {key!r} is not an option; {hint}"


@pytest.mark.parametrize(
    ("kind", "former", "now"),
    [
        (Recipe, {"share": 2}, r"layers_per_basis: 2 \(--layers-per-basis 2\)"),
        (Recipe, {"embeddings": "keep"}, r"embeddings: dense \(--embeddings dense\)"),
        (TuneRecipe, {"method": "lora"}, r"recovery: lora \(--recovery lora\)"),
    ],
)
def test_former_name_is_refused_with_the_name_of_today(kind, former, now, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(former))
    with pytest.raises(UsageError, match=f"^run: .*; write {now}$"):
        check_recipe(kind, read_config(tmp_path / "recipe.yaml"), "run")


def test_good_values_are_accepted():
    recipe = check_recipe(Recipe, {"keep": "0.5", "targets": "q_proj", "ignore": [], "seed": 3, "rank_multiple": None})
    assert (recipe.keep, recipe.targets, recipe.ignore, recipe.seed) == (0.5, ("q_proj",), None, 3)
    assert check_recipe(Recipe, {"keep": 1, "refit": True}).keep == 1
    for name in METHODS:
        assert check_recipe(Recipe, {"method": name, "metric": name}).method == name
    for form in FORMS:
        assert check_recipe(Recipe, {"form": form}).form == form


def test_fields_that_do_not_go_together_are_refused():
    with pytest.raises(UsageError, match=r"^run: embeddings_keep = 0.3: .* --embeddings lowrank"):
        check_recipe(Recipe, {"embeddings_keep": 0.3}, "run")
    assert check_recipe(Recipe, {"embeddings_keep": 0.3, "embeddings": "lowrank"}).embeddings_keep == 0.3


PLANNED_TOO = {
    "keep": 0.7, "keep_of": "model", "form": "pivoted", "layers_per_basis": 3, "allocation": "loss",
    "rank_multiple": 8, "objective": "latency", "optimise": "size",
}  # fmt: skip


@pytest.mark.parametrize("name", PLANNED_TOO)
def test_what_a_plan_says_already_is_refused_beside_it(name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=f"run: --plan and {flag}: .* Leave one of them out"):
        check_recipe(Recipe, {"plan": "plan.json", name: PLANNED_TOO[name]}, "run")
    asked = Recipe.combine({"model": "m", name: PLANNED_TOO[name]}, {"plan": "plan.json"})
    assert asked == {"model": "m", "plan": "plan.json"}  # a flag wins over a file


def test_recipe_with_a_plan_survives_its_file(tmp_path):
    recipe = check_recipe(Recipe, {"plan": "plan.json", "method": "svd"})
    assert check_recipe(Recipe, read_config(config(tmp_path, recipe.to_yaml()))).plan == "plan.json"


def test_long_values_are_shortened_in_messages():
    with pytest.raises(UsageError) as refusal:
        check_recipe(Recipe, {"keep": "x" * 100_000}, "run")
    assert len(str(refusal.value)) < 600


def test_own_method_and_form_are_registered_under_their_names():
    class Halves(FORMS["lowrank"]):
        form = "halves"

    own = replace(METHODS["svd"], name="own-svd")
    recipe = Recipe(method=own, form=Halves)
    assert (recipe.method, recipe.form) == ("own-svd", "halves")
    assert METHODS["own-svd"] is own
    assert FORMS["halves"] is Halves
    with pytest.raises(UsageError, match=r"method 'svd': .* Give yours a name of its own"):
        check_recipe(Recipe, {"method": replace(own, name="svd")})
    for registry, name in ((METHODS, "own-svd"), (FORMS, "halves")):
        del registry._added[name]


def test_recipe_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().keep = 0.1


def test_options_win_over_the_recipe():
    recipe = Recipe(keep=0.5, method="svd")
    merged = merge_recipe(Recipe, recipe, {"keep": 0.6}, "run")
    assert (merged.keep, merged.method) == (0.6, "svd")
    assert merged.model_fields_set == {"keep", "method"}  # a default is not turned into a choice
    assert merge_recipe(Recipe, None, {"keep": 0.6}, "run").keep == 0.6
    with pytest.raises(UsageError, match="run: 'kep' is not an option"):
        merge_recipe(Recipe, recipe, {"kep": 0.6}, "run")
    with pytest.raises(UsageError, match="run: recipe is a TuneRecipe; pass a Recipe"):
        merge_recipe(Recipe, TuneRecipe(), {}, "run")


def test_defaults_are_what_the_documents_say():
    assert (default_samples("causal"), default_samples("encoder")) == (128, 1024)
    words = {name: field.description for name, field in Recipe.model_fields.items()}
    assert "128 windows for causal models, 1,024 texts" in words["num_samples"]
    assert "512" in words["max_seq_length"]
    assert "Default: 8." in words["batch_size"]


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve_device("auto") == resolve_device(None) == torch.device(device)
    assert resolve_device("meta") == torch.device("meta")
    assert Recipe(device=None).device == Recipe().device == "auto"
    assert Recipe(device=torch.device("cpu")).device == "cpu"


def test_recipes_are_checked_without_torch():
    code = """
import sys
from eckart.compression.recipe import Recipe
from eckart.config import check_recipe
check_recipe(Recipe, {"method": "drone", "form": "pivoted", "device": "auto", "embeddings": "safe"})
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# -- the file ----------------------------------------------------------------------------------------


def config(tmp_path, text: str | bytes):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_recipe_survives_its_file(tmp_path):
    recipe = check_recipe(
        Recipe, {"method": "drone", "keep": 0.55, "targets": ["mlp.*", "é"], "refit": False, "seed": 7}
    )
    assert check_recipe(Recipe, read_config(config(tmp_path, recipe.to_yaml()))) == recipe
    assert "revision" not in yaml.safe_load(recipe.to_yaml())


def test_file_may_spell_options_as_flags_or_as_fields(tmp_path):
    text = "keep: 0.5\nmax-seq-length: 64\nkeep_of: model\n"
    assert read_config(config(tmp_path, text)) == {"keep": 0.5, "max_seq_length": 64, "keep_of": "model"}
    assert read_config(config(tmp_path, "# nothing yet\n")) == {}


BAD_FILES = {
    "python object": (
        "keep: 0.5\nmethod: !!python/object:os.system {}\n",
        "at line 2: the tag .*os.system is not read",
    ),
    "own tag": ("keep: !half 1\n", "at line 1: the tag !half is not read"),
    "key twice": ("keep: 0.5\nseed: 1\nkeep: 0.7\n", "at line 3: key 'keep' stands twice"),
    "key twice, two spellings": ("keep-of: sites\nkeep_of: model\n", "at line 2: key 'keep_of' stands twice"),
    "key twice, deeper": ("targets:\n  a: 1\n  a: 2\n", "at line 3: key 'a' stands twice"),
    "key is a list": ("? [a]\n: 1\n", r"at line 1: key \['a'\] is not a name"),
    "key is a number": ("1: 2\n", "at line 1: key 1 is not a name"),
    "broken": ("keep: [0.5\nseed: 1\n", "at line 2"),
    "list": ("- keep\n- 0.5\n", "holds a list, not `option: value` lines"),
    "two documents": ("keep: 0.5\n---\nkeep: 0.7\n", "at line 2"),
    "merge key": ("<<: {keep: 0.5}\n", "at line 1"),
    "control character": ("keep: 0.5\x00\n", "Only plain YAML"),
    "aliases that multiply": ("a: &a [1,2]\nb: &b [*a,*a]\nc: [*b,*b]\n", "at line 1: &a or \\*a: write it out"),
    "alias of nothing": ("keep: *a\n", "at line 1"),
    "a tag of YAML's own": ("keep: !!float x\n", "at line 1: the tag .*float is not read"),
    "nested too deeply": ("data: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "thousands of digits": ("seed: " + "9" * 5000, "Only plain YAML"),
    "larger than any run file": ("# " + "x" * (1 << 20), "larger than 1,048,576 bytes"),
    "not text": (b"\xff\xfe\xfa", "cannot be read"),
}


def test_bad_file_is_refused_with_name_and_line(tmp_path):
    for text, problem in BAD_FILES.values():
        path = config(tmp_path, text)
        with pytest.raises(UsageError, match=problem) as refusal:
            read_config(path)
        assert str(refusal.value).startswith(f"--config {path}")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--config .*nowhere\.yaml: cannot be read .* give the path of a YAML file"):
        read_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_config(tmp_path)


def test_only_true_and_false_are_booleans_and_numbers_are_decimal(tmp_path):
    text = "stream: on\ndata_column: no\nrevision: 2001-99-99\nnum_samples: 0100\nkeep: 1e-1\nrefit: true\nseed: 1:30\n"
    assert read_config(config(tmp_path, text)) == {
        "stream": "on", "data_column": "no", "revision": "2001-99-99", "num_samples": 100, "keep": 0.1, "refit": True,
        "seed": "1:30",
    }  # fmt: skip
    assert check_recipe(Recipe, {"stream": "on", "refit": "no"}).refit is False
    run = config(tmp_path, "model: m\noutput_dir: out\noverwrite: yes\n")
    assert read_run(run)[1].override(None, None) == (Path("out"), True)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_no_run_file(kind, tmp_path):
    path = Path("/dev/zero")
    if kind == "pipe":
        os.mkfifo(path := tmp_path / "pipe")
    with pytest.raises(UsageError, match="it is a pipe or a device, not a file"):
        read_config(path)


@pytest.mark.parametrize("text", ['output_dir: "a\\0b"\n', 'output_dir: "\\ud800"\n'])
def test_output_that_no_path_can_be_is_refused(text, tmp_path):
    with pytest.raises(UsageError, match=r"output_dir .* holds characters that no path can have"):
        read_run(config(tmp_path, text))


@pytest.mark.parametrize("text", ["keep: .nan\n", "keep: yes\n", "seed: 1e400\n", "keep: 2001-99-99\n"])
def test_words_that_yaml_makes_numbers_of_are_refused(text, tmp_path):
    with pytest.raises(UsageError, match=r"^run: (keep|seed) = "):
        check_recipe(Recipe, read_config(config(tmp_path, text)), "run")
