"""`packing_is_exact` against what models do, and what follows from it for their losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from loku.data import MODEL_INPUTS, Role, UnlearningCollator, packing_is_exact

_IDS = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **_IDS}


def build(family: str, attention: str = "eager", dtype: torch.dtype = torch.float32, spread: float = 0.02) -> nn.Module:
    torch.manual_seed(1)
    options = {"attn_implementation": attention, "initializer_range": spread}
    if family == "gpt_neo":
        sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 32, **_IDS}
        config = GPTNeoConfig(attention_types=[[["global", "local"], 1]], window_size=4, **sizes, **options)
        model = GPTNeoForCausalLM(config)
    elif family == "phi":
        model = PhiForCausalLM(PhiConfig(intermediate_size=48, max_position_embeddings=32, **_SIZES, **options))
    elif family == "llama":
        sizes = {"intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 32}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **_SIZES, **options))
    elif family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, **_IDS, **options))
    elif family == "bloom":  # position biases, and attention to the whole row
        model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, **_IDS))
    else:  # opt
        model = OPTForCausalLM(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **_SIZES))
    return model.to(dtype)


EXACT = [("gpt_neo", "eager"), *((family, kind) for family in ("phi", "llama", "gpt2") for kind in ("eager", "sdpa"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "attention"), EXACT)
def test_families_that_keep_sequences_apart(family, attention, dtype):
    assert packing_is_exact(build(family, attention, dtype))


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_families_that_do_not(family):
    """Both take ``position_ids`` without complaint."""
    assert not packing_is_exact(build(family))


class Wrapped(nn.Module):
    """A model with something wrong."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()


class Leaky(Wrapped):
    """A hundredth of the row's running mean is added to its embeddings."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> CausalLMOutput:
        embedded = self.get_input_embeddings()(input_ids)
        mean = embedded.cumsum(1) / torch.arange(1, embedded.shape[1] + 1)[:, None]
        return self.model(inputs_embeds=embedded + 0.01 * mean, position_ids=position_ids, use_cache=False)


class Misplaced(Wrapped):
    """Attention keeps sequences apart, but positions are counted through the row."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> CausalLMOutput:
        wpe = self.model.transformer.wpe
        rows, length = input_ids.shape
        if position_ids is None:
            return self.model(input_ids, use_cache=False)
        hook = wpe.register_forward_hook(lambda *_: wpe.weight[:length].expand(rows, -1, -1))
        try:
            return self.model(input_ids, position_ids=position_ids, use_cache=False)
        finally:
            hook.remove()


class FirstRowOnly(Wrapped):
    """Keeps sequences apart in a batch of one row only, as flash attention does."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> CausalLMOutput:
        return self.model(input_ids, position_ids=position_ids if len(input_ids) == 1 else None, use_cache=False)


class WithoutPositions(Wrapped):
    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        return self.model(input_ids, use_cache=False)


@pytest.mark.parametrize("kind", [Leaky, Misplaced, FirstRowOnly, WithoutPositions])
def test_what_is_wrong_is_seen(kind):
    model = build("gpt_neo")
    assert packing_is_exact(model)
    assert not packing_is_exact(kind(model))


def test_running_out_of_memory_is_no_answer():
    class Full(Wrapped):
        def forward(self, **_: Tensor) -> CausalLMOutput:
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        packing_is_exact(Full(build("llama")))


def test_the_model_and_the_generators_are_left_as_they_were():
    model = build("gpt2").train()  # with dropout
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    assert packing_is_exact(model)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["gpt_neo", "phi", "llama"])
def test_losses_are_the_same_packed_and_padded(family):
    """In float64, with sequences longer than the window of local attention, and both roles in one row."""
    model = build(family, "eager", torch.float64, spread=0.3).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = iter((11, 3, 17, 5, 8, 2))
    draw = [torch.randint(61, (n,), generator=generator).tolist() for n in lengths]
    items = [{Role(i % 2): {"input_ids": s, "labels": s}} for i, s in enumerate(draw)]
    losses, rows = [], []
    for row_tokens in (None, 20):
        batch = UnlearningCollator(0, row_tokens)(items)
        rows.append(len(batch["input_ids"]))
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[batch["rows"]]
        nll = nn.functional.cross_entropy(logits, batch["targets"], reduction="none")
        losses.append(torch.zeros(len(items), dtype=torch.float64).index_add_(0, batch["row_sequences"], nll))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    assert rows == [6, 3]
