"""An importance pass goes on from its checkpoint where all is as it was, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from fila_models import adapted, build
from fisher_oracle import padded, sequences

from loku.fila import FilaConfig, ImportanceCheckpoint, get_fila_state_dict

FORGET, RETAIN = padded(sequences(0), 1), padded(sequences(1), 1)


def model(scale: float = 1.0):
    base = build("llama")
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(scale)
    return adapted(base, target_modules=["q_proj", "up_proj"])


def of(path, model, forget=FORGET, data="tofu", **settings):
    checkpoint = ImportanceCheckpoint(path, every=0.0, data=data)
    return get_fila_state_dict(
        model, forget, RETAIN, FilaConfig(**settings), checkpoint=checkpoint, show_progress_bar=False
    )


def begin(path):
    """Breaks a pass off after two batches of the forget set."""

    def broken():
        yield from FORGET[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of(path, model(), broken())
    return path.with_name(f"{path.name}.sums-0")


def test_the_same_pass_goes_on(tmp_path):
    whole = get_fila_state_dict(model(), FORGET, RETAIN, show_progress_bar=False)
    sums = begin(tmp_path / "begun")
    # Not gone through again: batches without labels are refused otherwise.
    state = of(tmp_path / "begun", model(), [{}, {}, *FORGET[2:]])
    assert all(torch.equal(state[name], whole[name]) for name in whole) and len(state) == 4
    assert not sums.exists() and (tmp_path / "begun").exists()


def test_nothing_is_left_of_more_processes(tmp_path):
    """An earlier start may have had another that kept sums."""
    sums = begin(tmp_path / "begun[1]")
    sums.with_name("begun[1].sums-1").write_bytes(sums.read_bytes())
    of(tmp_path / "begun[1]", model())
    ImportanceCheckpoint(tmp_path / "begun[1]", every=0.0, data="tofu").remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("scale,settings", [(1.01, {}), (1.0, {"data": "tdec"}), (1.0, {"eps": 1e-3})])
def test_another_pass_is_refused(tmp_path, scale, settings, finished):
    path = tmp_path / "begun"
    if finished:
        of(path, model())
    else:
        begin(path)
    with pytest.raises(ValueError, match=r"begun.* was begun with another model, other data or other settings"):
        of(path, model(scale), **settings)


def test_sums_that_are_cut_short_are_refused(tmp_path):
    sums = begin(tmp_path / "begun")
    sums.write_bytes(sums.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"begun\.sums-0 is not a whole safetensors file"):
        of(tmp_path / "begun", model())
