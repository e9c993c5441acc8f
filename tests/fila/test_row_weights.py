"""Row weights against their formula, and their file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loku.fila import FilaConfig, FilaStateDict, row_weights


def fisher(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Entries over twelve decades, some exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (12 * torch.rand(rows, columns, generator=generator) - 14)
    values[torch.rand(rows, columns, generator=generator) < 0.2] = 0
    values[0, 0] = 1e-6
    return values


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([1e-12, 1e-5]))
def test_formula(rows, columns, seed, eps):
    forget, retain = fisher(rows, columns, seed), fisher(rows, columns, seed + 1)
    expected = (forget.double() / (eps + retain.double())).sum(1).sqrt()
    torch.testing.assert_close(row_weights(forget, retain, eps).double(), expected, rtol=1e-7, atol=0)
    relative = eps * retain.double().mean()
    expected = (forget.double() / (relative + retain.double())).sum(1).sqrt()
    torch.testing.assert_close(row_weights(forget, retain, eps, "relative").double(), expected, rtol=1e-7, atol=0)


def test_relative_eps_does_not_depend_on_the_scale_of_the_gradients():
    forget, retain = fisher(8, 9, 0), fisher(8, 9, 1)
    scaled = row_weights(2**-40 * forget, 2**-40 * retain, eps_mode="relative")
    torch.testing.assert_close(scaled, row_weights(forget, retain, eps_mode="relative"), rtol=1e-6, atol=0)


def test_more_rows_than_fit_a_piece(monkeypatch):
    monkeypatch.setattr("loku.fila.relative_importance._CHUNK_ELEMENTS", 20)
    forget, retain = fisher(11, 9, 0), fisher(11, 9, 1)
    expected = (forget.double() / (1e-5 + retain.double())).sum(1).sqrt()
    torch.testing.assert_close(row_weights(forget, retain).double(), expected, rtol=1e-7, atol=0)


def test_bad_fisher_is_refused_by_the_name_of_its_module():
    good = fisher(4, 5, 0)
    with pytest.raises(ValueError, match=r"retain Fisher of h\.0\.fc is zero everywhere"):
        row_weights(good, torch.zeros(4, 5), name="h.0.fc")
    with pytest.raises(ValueError, match=r"forget Fisher of h\.0\.fc is zero everywhere"):
        row_weights(torch.zeros(4, 5), good, name="h.0.fc")
    for bad in (float("nan"), float("inf"), -1.0):
        broken = good.clone()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match=r"retain Fisher of h\.0\.fc has a negative, infinite or NaN entry"):
            row_weights(good, broken, name="h.0.fc")
    with pytest.raises(ValueError, match=r"one shape \(out, in\), got \(4, 5\) .* and \(5, 4\)"):
        row_weights(good, good.T)


def test_state_survives_its_file(tmp_path):
    state = FilaStateDict({"a.b": torch.rand(3), "c": torch.rand(5)}, {"a.b": "12"}, {"eps": 1e-5})
    state.save(tmp_path / "new" / "state.safetensors")
    loaded = FilaStateDict.load(tmp_path / "new" / "state.safetensors")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    assert loaded.fingerprints == {"a.b": "12"} and loaded.importance == {"eps": 1e-5}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state.safetensors"]
    save_file({"a.b": torch.rand(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold FILA row weights"):
        FilaStateDict.load(tmp_path / "other.safetensors")


def test_a_state_that_is_cut_short_or_none_is_refused_by_the_name_of_its_file(tmp_path):
    path = tmp_path / "state.safetensors"
    FilaStateDict({"a": torch.rand(3)}).save(path)
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[: len(whole) // 2], whole[:4], b"", b"no tensors in here" * 20):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"state\.safetensors is not a whole safetensors file"):
            FilaStateDict.load(path)


@pytest.mark.parametrize(
    "settings_,message",
    [
        ({"mode": "both"}, "mode must be one of"),
        ({"eps": 0.0}, "eps must be a number above 0 and below inf, got 0"),
        ({"eps_mode": "auto"}, "eps_mode must be one of"),
        ({"granularity": "row"}, "granularity must be one of"),
        ({"rtol": -1}, "rtol must be a number above 0 and below 1, got -1"),
        ({"eps": float("inf")}, "eps must be a number above 0 and below inf, got inf"),
        ({"eps": "1e-5"}, "eps must be a number above 0"),
        ({"rtol": 1.0}, "rtol must be a number above 0 and below 1, got 1.0"),
        ({"residual_dtype": "float32"}, "residual_dtype must be a floating point dtype, got 'float32'"),
        ({"residual_dtype": torch.int8}, "residual_dtype must be a floating point dtype"),
        ({"memory_budget": 0}, "memory_budget must be a positive number of bytes"),
    ],
)
def test_bad_settings_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        FilaConfig(**settings_)
