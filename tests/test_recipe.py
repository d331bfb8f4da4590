"""A recipe that cannot be is refused at the field, with what to write instead."""

import pytest
import yaml

from eckart.compression.recipe import Recipe, make_recipe, read_config
from eckart.errors import UsageError
from eckart.forms import FORMS
from eckart.methods import METHODS

BAD_FIELDS = [
    ("keep", 0, "greater than 0"),
    ("keep", 1.5, "less than or equal to 1"),
    ("keep", -0.5, "greater than 0"),
    ("keep", float("nan"), "finite number"),
    ("keep", float("inf"), "finite number"),
    ("keep", True, "not a boolean"),
    ("keep", "abc", "valid number"),
    ("keep", None, "valid number"),
    ("keep", [0.5], "valid number"),
    ("keep_of", "layers", "'sites' or 'model'"),
    ("rank_multiple", 0, "greater than or equal to 1"),
    ("rank_multiple", True, "not a boolean"),
    ("rank_multiple", 2.5, "valid integer"),
    ("num_samples", -4, "greater than or equal to 1"),
    ("max_seq_length", 1, "greater than or equal to 2"),
    ("batch_size", 0, "greater than or equal to 1"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", False, "not a boolean"),
    ("allocation", "greedy", "'uniform' or 'loss'"),
    ("curvature", "none", "'auto', 'sampled' or 'labels'"),
    ("dtype", "int8", "'float32', 'bfloat16' or 'float16'"),
    ("method", "svd_lm", "Did you mean 'svd-llm'?"),
    ("method", 5, "valid string"),
    ("method", "builtins.eval", "Choose one of: eckart, svd"),
    ("metric", "dron", "Did you mean 'drone'?"),
    ("form", "pivot", "it knows lowrank, pivoted"),
    ("targets", 5, "valid tuple"),
    ("trust_remote_code", "perhaps", "valid boolean"),
]


@pytest.mark.parametrize(("field", "value", "problem"), BAD_FIELDS, ids=lambda part: str(part)[:20])
def test_bad_value_names_place_field_value_and_meaning(field, value, problem):
    with pytest.raises(UsageError) as refusal:
        make_recipe({field: value}, "--config run.yaml")
    message = str(refusal.value)
    assert message.startswith(f"--config run.yaml: {field} = {value!r}: ")
    assert problem in message
    assert Recipe.model_fields[field].description in message  # what the option is for: the way to mend it


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("keeep", "did you mean 'keep'?"),
        ("max_seq_len", "did you mean 'max_seq_length'?"),
        ("zzz", f"known are: {', '.join(Recipe.model_fields)}."),
        (3, f"known are: {', '.join(Recipe.model_fields)}."),
    ],
)
def test_unknown_key_gets_the_nearest_spelling(key, hint):
    with pytest.raises(UsageError) as refusal:
        make_recipe({key: 1}, "eckart.compress")
    assert str(refusal.value) == f"eckart.compress: {key!r} is not an option; {hint}"


def test_good_values():
    recipe = make_recipe({"keep": "0.5", "targets": "q_proj", "ignore": [], "seed": 3, "rank_multiple": None})
    assert (recipe.keep, recipe.targets, recipe.ignore, recipe.seed) == (0.5, ("q_proj",), None, 3)
    assert make_recipe({"keep": 1}).keep == 1
    for name in METHODS:
        assert make_recipe({"method": name, "metric": name}).method == name
    for form in FORMS:
        assert make_recipe({"form": form}).form == form


def test_recipe_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().keep = 0.1


# -- the file ----------------------------------------------------------------------------------------


def config(tmp_path, text: str | bytes):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_config_round_trip(tmp_path):
    recipe = make_recipe({"method": "drone", "keep": 0.55, "targets": ["mlp.*", "é"], "refit": False, "seed": 7})
    assert make_recipe(read_config(config(tmp_path, recipe.to_yaml()))) == recipe
    assert "revision" not in yaml.safe_load(recipe.to_yaml())


def test_config_spells_options_as_flags_or_as_fields(tmp_path):
    text = "keep: 0.5\nmax-seq-length: 64\nkeep_of: model\n"
    assert read_config(config(tmp_path, text)) == {"keep": 0.5, "max_seq_length": 64, "keep_of": "model"}
    assert read_config(config(tmp_path, "# nothing yet\n")) == {}


BAD_CONFIGS = {
    "python object": ("keep: 0.5\nmethod: !!python/object:os.system {}\n", "at line 2: could not determine"),
    "python call": ("method: !!python/object/apply:os.system ['true']\n", "at line 1: could not determine"),
    "own tag": ("keep: !half 1\n", "at line 1: could not determine a constructor"),
    "key twice": ("keep: 0.5\nseed: 1\nkeep: 0.7\n", "at line 3: key 'keep' stands twice"),
    "key twice, two spellings": ("keep-of: sites\nkeep_of: model\n", "at line 2: key 'keep_of' stands twice"),
    "key twice, deeper": ("targets:\n  a: 1\n  a: 2\n", "at line 3: key 'a' stands twice"),
    "key is a list": ("? [a]\n: 1\n", r"at line 1: key \['a'\] is not a name"),
    "key is a number": ("1: 2\n", "at line 1: key 1 is not a name"),
    "broken": ("keep: [0.5\nseed: 1\n", "at line 2"),
    "tab": ("keep:\n\t- 1\n", "at line 2"),
    "list": ("- keep\n- 0.5\n", "holds a list, not `option: value` lines"),
    "text": ("keep 0.5\n", "holds a str"),
    "two documents": ("keep: 0.5\n---\nkeep: 0.7\n", "at line 2"),
    "merge key": ("<<: {keep: 0.5}\n", "at line 1"),
    "unknown alias": ("keep: *half\n", "at line 1"),
    "control character": ("keep: 0.5\x00\n", "Only plain YAML"),
    "not text": (b"\xff\xfe\xfa", "cannot be read"),
}


@pytest.mark.parametrize(("text", "problem"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_config_names_file_and_line(text, problem, tmp_path):
    path = config(tmp_path, text)
    with pytest.raises(UsageError, match=problem) as refusal:
        read_config(path)
    assert str(refusal.value).startswith(f"--config {path}")


def test_missing_config(tmp_path):
    with pytest.raises(UsageError, match=r"--config .*nowhere\.yaml: cannot be read .* give the path of a YAML file"):
        read_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["keep: .nan\n", "keep: yes\n", "keep: -.inf\n", "seed: 1e400\n"])
def test_numbers_that_yaml_makes_of_words(text, tmp_path):
    with pytest.raises(UsageError, match=r"^run: (keep|seed) = "):
        make_recipe(read_config(config(tmp_path, text)), "run")
