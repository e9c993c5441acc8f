"""Each method's loss and gradient are those of its paper's formula, written out in float64 over single sequences."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid
from training_setup import causal_lm, scored_logits, sequences, with_adapter

from loku.data import Role, UnlearningCollator
from loku.head import OutputHead
from loku.training import METHODS, Scorer, get_method
from loku.training.methods import Totals
from loku.training.scores import HiddenScores

FORGET, RETAIN, PREFERRED = sequences(4, 1), sequences(5, 2), sequences(4, 3)
OPTIONS = [
    *((name, {}) for name in METHODS),
    ("ihl", {"retain_weight": 0}),
    ("gd", {"retain_weight": 0.3}),
    ("kl", {"retain_weight": 2.5}),
    ("kl", {"retain_weight": 0}),
    ("npo", {"retain_weight": 0.7, "beta": 0.4}),
    ("simnpo", {"retain_weight": 0.7, "beta": 1.5, "gamma": 0.8}),
    ("dpo", {"retain_weight": 0.7, "beta": 0.4}),
]
DEFAULTS = {"npo": 0.1, "dpo": 0.1, "simnpo": 2.5}


def log_p(logits, targets):
    return -cross_entropy(logits, targets, reduction="none")


def hinge(logits, targets):
    p = logits.softmax(dim=-1)
    p_target = p.gather(1, targets[:, None])[:, 0]
    return 1 + p_target - p.scatter(1, targets[:, None], -1).amax(dim=1)


def token_mean(loss, scored):
    return torch.cat([loss(*one) for one in scored]).mean()


def divergence(own, reference):
    terms = []
    for (logits, _), (ref_logits, _) in zip(own, reference, strict=True):
        log_ref = ref_logits.log_softmax(dim=-1)
        terms.append((log_ref.exp() * (log_ref - logits.log_softmax(dim=-1))).sum(dim=-1))
    return torch.cat(terms).mean()


def by_definition(name, options, own, reference):
    """``own`` and ``reference``: role -> (logits, targets) of each sequence."""
    forget, retain = own[Role.FORGET], own[Role.RETAIN]
    beta = options.get("beta", DEFAULTS.get(name))
    weight = options.get("retain_weight", 0 if name in ("ga", "npo", "simnpo", "dpo") else 1)
    retain_loss = -token_mean(log_p, retain)

    def ratio(role):
        pairs = zip(own[role], reference[role], strict=True)
        return torch.stack([log_p(*one).sum() - log_p(*ref).sum() for one, ref in pairs])

    if name in ("loku", "ihl"):
        loss = token_mean(hinge, forget)
    elif name in ("gd", "gd+fila", "ga", "kl"):
        loss = token_mean(log_p, forget)
    elif name == "npo":
        loss = (2 / beta * torch.log1p(torch.exp(ratio(Role.FORGET)) ** beta)).mean()
    elif name == "simnpo":
        lengthwise = torch.stack([log_p(*one).sum() / len(one[1]) for one in forget])
        loss = (-2 / beta * logsigmoid(-beta * lengthwise - options.get("gamma", 0))).mean()
    elif name == "dpo":
        loss = -logsigmoid(beta * ratio(Role.PREFERRED) - beta * ratio(Role.FORGET)).mean()
    else:
        loss = 0
    return loss + weight * (divergence(retain, reference[Role.RETAIN]) if name == "kl" else retain_loss)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture(scope="module")
def base():
    return causal_lm("llama", torch.float64)


@pytest.mark.parametrize("path", ["hidden states", "logits"])
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_formula(base, name, options, path):
    """From one batch, and from two whose shares sum to the same; the reference is the base without an adapter."""
    model, method = with_adapter(base).eval(), get_method(name, **options)
    pools = {Role.FORGET: FORGET, Role.RETAIN: RETAIN[:4], Role.PREFERRED: PREFERRED}
    own = {role: [scored_logits(model, example) for example in pool] for role, pool in pools.items()}
    with torch.no_grad():
        reference = {role: [scored_logits(base, example) for example in pool] for role, pool in pools.items()}
    expected = by_definition(name, options, own, reference)
    expected.backward()
    expected_gradients = gradients(model)
    assert len(expected_gradients) == 8

    scorer = Scorer(model, chunk_bytes=8 * 61 * 8)  # a few rows of logits at a time
    assert scorer.refusal is None
    if path == "logits":
        scorer.refusal = "for this test"
    for parts in ([slice(0, 4)], [slice(0, 3), slice(3, 4)]):
        batches = [_batch({role: pools[role][part] for role in method.roles}) for part in parts]
        totals = Totals(*sum(torch.stack(Totals.of(batch)) for batch in batches))
        value, logged = 0, {}
        for batch in batches:
            scored_by_reference = None
            if method.reference:
                with torch.no_grad(), model.disable_adapter():
                    scored_by_reference = scorer(model, batch)
            loss = method.loss(scorer(model, batch), scored_by_reference, totals)
            loss.value.backward()
            value = value + loss.value.detach()
            logged = {part: logged.get(part, 0) + term for part, term in loss.parts.items()}
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
        logged_sum = logged.get("forget_loss", 0) + method.retain_weight * logged.get("retain_loss", 0)
        torch.testing.assert_close(logged_sum, value, rtol=1e-10, atol=1e-10)
        found = gradients(model)
        for parameter, gradient in expected_gradients.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-7, atol=1e-10 * gradient.abs().max().item())


def _batch(pools):
    """Item i has sequence i of each role, retain too."""
    count = len(next(iter(pools.values())))
    return UnlearningCollator(0)([{role: pool[i] for role, pool in pools.items()} for i in range(count)])


def test_settings_and_their_refusals():
    assert get_method("npo", beta=0.5, gamma=None).beta == 0.5
    assert get_method("loku").fila and get_method("gd+fila").fila and not get_method("ihl").fila
    assert [name for name in METHODS if get_method(name).reference] == ["kl", "npo", "dpo"]
    assert get_method("ga", retain_weight=0.1).roles == (Role.FORGET, Role.RETAIN)
    assert get_method("finetune").roles == (Role.RETAIN,)
    assert get_method("dpo").roles == (Role.FORGET, Role.PREFERRED)
    with pytest.raises(ValueError, match=r"method must be one of loku, ihl, .*finetune, got 'lora'"):
        get_method("lora")
    with pytest.raises(ValueError, match=r"method 'kl' has no option 'beta'; it has retain_weight"):
        get_method("kl", beta=0.1)
    with pytest.raises(ValueError, match="retain_weight must be finite and at least 0, got -1"):
        get_method("gd", retain_weight=-1)
    with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
        get_method("npo", beta=0)
    with pytest.raises(ValueError, match="retain_weight must be positive for method 'finetune'"):
        get_method("finetune", retain_weight=0)


def test_selection_and_sums_by_sequence(base):
    model = with_adapter(base)
    batch = _batch({Role.FORGET: FORGET, Role.RETAIN: RETAIN[:4]})
    scores = Scorer(model)(model, batch)
    forget = scores.of(Role.FORGET)
    assert forget.targets.tolist() == [label for example in FORGET for label in example["labels"][1:] if label != -100]
    assert len(scores.of(Role.FORGET, Role.RETAIN).targets) == len(scores.targets)
    assert len(scores.of(Role.PREFERRED).targets) == 0
    lengths = [sum(label != -100 for label in example["labels"]) for example in FORGET]
    assert forget.sequence_lengths().tolist() == [*lengths, 0, 0, 0, 0]
    assert forget.sum_by_sequence(torch.ones(sum(lengths))).tolist() == [*lengths, 0, 0, 0, 0]


def test_log_probability_of_a_memorised_token():
    """1 - p of about 1e-13 is no rounding error of 1."""
    hidden, weight = torch.eye(2, 8), torch.zeros(5, 8)
    weight[3, 0] = weight[1, 1] = 30
    head = OutputHead(weight, None, scale=1.0, softcap=None, autocast=None)
    rows = {"row_sequences": torch.tensor([0, 0]), "targets": torch.tensor([3, 1])}
    scores = HiddenScores(roles=torch.tensor([0]), **rows, chunk_bytes=None, hidden=hidden, head=head)
    expected = -torch.log1p(4 * torch.exp(torch.tensor(-30.0, dtype=torch.float64))).expand(2).float()
    torch.testing.assert_close(scores.log_probabilities(), expected, rtol=1e-5, atol=0)
