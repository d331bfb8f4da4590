"""How tokens become a sentence embedding."""

from __future__ import annotations

import pytest
import torch
from test_data_models import t5

from eckart.data import Batch, Pooling
from eckart.errors import DataError, UsageError
from eckart.evaluation.agreement import embed_sentences


def test_pooling_modes():
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    assert torch.equal(Pooling()(hidden, mask), torch.stack([hidden[0, :3].mean(0), hidden[1, 2:].mean(0)]))
    assert torch.equal(Pooling(("cls",))(hidden, mask), torch.stack([hidden[0, 0], hidden[1, 2]]))
    assert torch.equal(Pooling(("lasttoken",))(hidden, mask), torch.stack([hidden[0, 2], hidden[1, 3]]))
    assert torch.equal(Pooling(("max",))(hidden, mask), torch.stack([hidden[0, 2], hidden[1, 3]]))
    both = Pooling(("cls", "max"), normalize=True)(hidden, mask)
    assert both.shape == (2, 6)
    assert torch.allclose(both.norm(dim=-1), torch.ones(2))
    spoilt = hidden.clone()
    spoilt[0, 3] = torch.nan
    assert torch.equal(Pooling()(spoilt, mask), Pooling()(hidden, mask))
    assert torch.equal(Pooling()(hidden), hidden.mean(1))
    assert Pooling()(hidden.bfloat16(), mask).dtype == torch.float32
    with pytest.raises(UsageError, match="no last hidden state"):
        Pooling()(torch.zeros(2, 3))


def test_pooling_passes_gradients():
    hidden = torch.randn(2, 4, 3, requires_grad=True)
    Pooling(normalize=True)(hidden, torch.tensor([[1, 1, 0, 0]] * 2))[:, 0].sum().backward()
    assert hidden.grad[:, 2:].abs().max() == 0
    assert hidden.grad[:, :2].abs().min() > 0


def test_pooling_from_a_folder(tmp_path):
    assert Pooling.from_folder(tmp_path) is None
    (tmp_path / "1_Pooling").mkdir()
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    assert Pooling.from_folder(tmp_path) == Pooling(("cls",))
    config.write_text('{"embedding_dimension": 8, "pooling_mode": ["mean", "max"]}')
    assert Pooling.from_folder(tmp_path) == Pooling(("mean", "max"))
    (tmp_path / "modules.json").write_text(
        '[{"path": "", "type": "sentence_transformers.models.Transformer"},'
        ' {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},'
        ' {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]'
    )
    config.write_text('{"pooling_mode": "lasttoken"}')
    assert Pooling.from_folder(tmp_path) == Pooling(("lasttoken",), normalize=True)
    config.write_text('{"pooling_mode": "median"}')
    with pytest.raises(DataError, match=r"config\.json: pooling mode 'median'.*mean, cls"):
        Pooling.from_folder(tmp_path)
    config.write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not readable as JSON"):
        Pooling.from_folder(tmp_path)


def test_the_encoders_side_is_pooled():
    ids = torch.tensor([[5, 6, 7]])
    batch = Batch({"input_ids": ids, "decoder_input_ids": torch.tensor([[0, 5]])}, (0,))
    model = t5().eval()
    with torch.no_grad():
        expected = model.encoder(input_ids=ids).last_hidden_state.mean(1).double()
        assert torch.allclose(embed_sentences(model, batch), expected, atol=1e-6)
