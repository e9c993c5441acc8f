"""Data: sources, prompts, tokenised examples, pairs of forget and retain sequences, and their batches.

prompt = prompt_for(model.config)
forget = tokenise(load_records("forget10", data_dir), tokenizer, prompt, max_length=512)
retain = tokenise(load_records("retain90", data_dir), tokenizer, prompt, max_length=512)
pairs = PairedDataset({Role.FORGET: forget, Role.RETAIN: retain}, seed=0)
collator = UnlearningCollator(tokenizer.eos_token_id, row_tokens=1024 if packing_is_exact(model) else None)
loader = DataLoader(pairs, batch_size=8, shuffle=True, collate_fn=collator)
"""

from loku.data.batching import token_budget_batches
from loku.data.collate import MODEL_INPUTS, LanguageModelCollator, UnlearningCollator, first_fit
from loku.data.examples import IGNORE_INDEX, Example, answer_example, is_question, tokenise
from loku.data.json_lines import read_json_lines
from loku.data.packing import packing_is_exact
from loku.data.pairing import PairedDataset
from loku.data.prompts import PROMPTS, PromptTemplate, prompt_for
from loku.data.records import TOFU_SPLITS, load_records
from loku.data.refusals import DEFAULT_REFUSALS, load_refusals, with_refusals
from loku.data.roles import Role

__all__ = [
    "DEFAULT_REFUSALS",
    "IGNORE_INDEX",
    "MODEL_INPUTS",
    "PROMPTS",
    "TOFU_SPLITS",
    "Example",
    "LanguageModelCollator",
    "PairedDataset",
    "PromptTemplate",
    "Role",
    "UnlearningCollator",
    "answer_example",
    "first_fit",
    "is_question",
    "load_records",
    "load_refusals",
    "packing_is_exact",
    "prompt_for",
    "read_json_lines",
    "token_budget_batches",
    "tokenise",
    "with_refusals",
]
