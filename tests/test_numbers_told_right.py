"""Numbers that go wrong: the message says which, where, and why, and does not call finite ones NaN."""

import os
from pathlib import Path

import pytest
import torch
from tiny import llama, place, text

import eckart
from eckart.compression.assemble import Assembly
from eckart.errors import ModelError, NumericalError
from eckart.linalg import Metric, Problem, factorize

OPTIONS = {"num_samples": 8, "max_seq_length": 32, "batch_size": 4, "keep": 0.6}


def changed(home: Path, change) -> Path:
    model = llama(num_hidden_layers=2).float()
    with torch.no_grad():
        change(model.model.layers, model.lm_head)
    text(home)
    return place(model, home / "llama", torch.float32)


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30])
def test_large_and_small_finite_weights_are_factored(size):
    target = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    target *= size / target.abs().max()
    metric = torch.eye(20) * torch.arange(1.0, 21.0)
    found = factorize(Problem(target, Metric(), Metric(full=metric)))
    plain = factorize(Problem(target / size, Metric(), Metric(full=metric)))
    left, right = found.factors
    torch.testing.assert_close((left / size) @ right, (plain.factors[0] @ plain.factors[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.squared / size / size, plain.squared, rtol=1e-4, atol=1e-9)


def test_finite_weights_of_a_model_are_never_called_nan(tmp_path):
    folder = changed(tmp_path, lambda layers, _: layers[0].mlp.up_proj.weight.mul_(1e31))
    assert eckart.compress(folder, method="svd", keep=0.6).model


def test_predictions_that_are_certain_are_not_called_unreached(tmp_path):
    folder = changed(tmp_path, lambda _, head: head.weight.mul_(1e8))
    with pytest.raises(ModelError, match=r"none of the 14 chosen sites .*no gradient.* is certain .*--method drone"):
        eckart.compress(folder, data=str(tmp_path / "text.txt"), **OPTIONS)


@pytest.mark.parametrize("method", ["drone", "eckart"])
@pytest.mark.parametrize("stream", ["on", "off"])
def test_activations_that_overflow_are_named_with_place_and_batch(method, stream, tmp_path):
    def change(layers, _):
        layers[0].mlp.up_proj.weight.fill_(1e18)
        layers[0].mlp.down_proj.weight.fill_(1e18)
        layers[0].mlp.gate_proj.weight.fill_(1e3)

    folder = changed(tmp_path, change)
    place = r"output of model\.layers\.0, calibration examples \d" if stream == "on" else r"input of .*, batch 0"
    with pytest.raises(NumericalError, match=f"{place}.*: there are values that are NaN or infinite"):
        eckart.compress(folder, method=method, data=str(tmp_path / "text.txt"), stream=stream,
                        output_dir=tmp_path / "out", **OPTIONS)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_inspection_names_a_weight_that_is_nan(tmp_path):
    folder = changed(tmp_path, lambda layers, _: layers[1].mlp.up_proj.weight[0, :2].fill_(float("nan")))
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 2 of 1536 entries are NaN"):
        eckart.inspect(folder)


def test_a_result_that_puts_out_nan_is_not_published(tmp_path, monkeypatch):
    folder = changed(tmp_path, lambda *_: None)
    own = Assembly.put_forms

    def spoil(self, *args):
        model, notes = own(self, *args)
        model.model.norm.weight.data.fill_(float("inf"))
        return model, notes

    monkeypatch.setattr(Assembly, "put_forms", spoil)
    with pytest.raises(NumericalError, match="output on held-out text is not finite"):
        eckart.compress(folder, method="drone", data=str(tmp_path / "text.txt"), output_dir=tmp_path / "out", **OPTIONS)
    assert sorted(os.listdir(tmp_path)) == ["llama", "text.txt"]
