"""The format is registered once transformers is imported, before or after eckart; nothing is imported for that."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import llama
from transformers import modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import eckart
from eckart.checkpoint import register

SOURCE = Path(eckart.__file__).parent

FRESH = """
import importlib, sys, types
package = sys.modules["eckart"] = types.ModuleType("eckart")  # what eckart/__init__.py imports is not asked here
package.__path__ = [sys.argv[1]]
from eckart.checkpoint import register
register.register_when_imported()
register.register_when_imported()
assert not {"torch", "transformers"} & set(sys.modules), "imported too early"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
assert type(model.model.layers[0].mlp.up_proj).__module__.startswith("eckart.forms"), model
left = [finder for finder in sys.meta_path if type(finder).__module__.startswith("eckart")]
assert [finder.watched for finder in left] == ["peft.tuners.lora.model"], "the finder is left"
"""


def test_from_pretrained_finds_the_format_in_a_fresh_process(tmp_path):
    eckart.compress(llama(num_hidden_layers=1), method="svd", form="lowrank", keep=0.5).save_pretrained(tmp_path / "m")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-W", "error::RuntimeWarning", "-c", FRESH, str(SOURCE), str(tmp_path / "m")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


QUANTIZERS_FIRST = """
import sys
import eckart
assert not {"peft", "torch", "transformers"} & set(sys.modules), "imported too early"
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1])
assert "transformers.modeling_utils" not in sys.modules, "the case is another one now"
from transformers.quantizers import AutoQuantizationConfig
assert type(AutoQuantizationConfig.from_dict(config.quantization_config)).__name__ == "EckartConfig"
import peft
from transformers import AutoModelForCausalLM
model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), peft.LoraConfig())
assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__ == "FactoredLora"
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("eckart")], "a finder is left"
"""


def test_who_reads_the_quantization_before_any_model_finds_the_format_and_peft_imported_later_is_told(tmp_path):
    """lm_eval asks for the class of `quantization_config` first."""
    pytest.importorskip("peft", reason="pip install 'eckart[peft]'")
    eckart.compress(llama(num_hidden_layers=1), method="svd", form="lowrank", keep=0.5).save_pretrained(tmp_path / "m")
    words = [sys.executable, "-c", QUANTIZERS_FIRST, str(tmp_path / "m")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_format_is_registered_at_once_where_transformers_is_imported_already():
    for _ in range(2):
        AUTO_QUANTIZER_MAPPING.pop("eckart", None)
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop("eckart", None)
        register.register_when_imported()
        assert "eckart" in AUTO_QUANTIZER_MAPPING
        assert "eckart" in AUTO_QUANTIZATION_CONFIG_MAPPING
    finders = [finder for finder in sys.meta_path if type(finder).__module__ == register.__name__]
    assert not [finder for finder in finders if finder.watched == register.WATCHED]
    assert modeling_utils.__name__ == register.WATCHED


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A module that stands for transformers', and the names that were registered when it was imported."""
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in/__init__.py").touch()
    (tmp_path / "stand_in/models.py").write_text("import stand_in.needed\nfinished = True\n")
    (tmp_path / "stand_in/needed.py").touch()
    registered = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(register, "WATCHED", "stand_in.models")
    monkeypatch.setattr(register, "PLUGINS", {"stand_in.models": "none"})
    monkeypatch.setattr(register, "_register", lambda _: registered.append(sys.modules["stand_in.models"].finished))
    yield registered
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "watched", "") != "stand_in.models"]
    for name in [name for name in sys.modules if name.startswith("stand_in")]:
        del sys.modules[name]


def test_registration_follows_the_import_once_and_leaves_no_trace(watched):
    before = list(sys.meta_path)
    register.register_when_imported()
    register.register_when_imported()
    module = importlib.import_module("stand_in.models")
    assert watched == [True]
    assert sys.meta_path == before
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
    importlib.reload(module)
    assert watched == [True]
    register.register_when_imported()
    assert watched == [True, True]


def test_import_that_failed_is_followed_when_it_succeeds(watched, monkeypatch):
    register.register_when_imported()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "stand_in.needed", None)
        with pytest.raises(ImportError):
            importlib.import_module("stand_in.models")
    assert watched == []
    importlib.import_module("stand_in.models")
    assert watched == [True]


def test_registration_that_fails_warns_and_lets_transformers_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "eckart.checkpoint.plugin", None)
    with pytest.warns(RuntimeWarning, match="cannot register its checkpoint format .* pip install -U"):
        register.register_when_imported()
